"""A checkpoint is there whole, or `CheckpointError` is raised: whatever a disk or a stranger did to it."""

import json
import math
import os
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.checkpoint import shards, store
from tf_dist.checkpoint.manifest import DTYPES, FORMAT, VERSION, crc32_of, header, read_manifest
from tf_dist.errors import CheckpointError

FACTS = {"tokens": 12345, "config": {"layers": 2, "learning_rate": 1e-3}, "note": "é", "none": None}


def tensors(seed=0):
    random = np.random.default_rng(seed)
    return {
        "weights/0000/embedding": random.standard_normal((5, 3)).astype(np.float32),
        "weights/0001/bias": random.standard_normal(3).astype(np.float32),
        "optimizer/0000/iterations": np.array(7, np.int64),
    }


def save(folder, step=400, seed=0, facts=FACTS):
    return store.save(folder, step, tensors(seed), facts)


def same(loaded, expected):
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        assert loaded[name].dtype == np.asarray(array).dtype.newbyteorder("<")
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].shape == np.shape(array)


def is_sound(path, step=400, seed=0):
    loaded, facts, step_read = store.load(path)
    same(loaded, tensors(seed))
    assert (facts, step_read) == (FACTS, step)
    return True


def test_round_trip(tmp_path):
    path = save(tmp_path / "run" / "checkpoints")
    assert path.name == "step-00000400"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "shard-0000.safetensors"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step-00000400"]
    assert (path.parent / "latest").read_text() == "step-00000400\n"
    assert is_sound(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_shape_and_byte_order(tmp_path, dtype):
    whole = np.arange(24).reshape(2, 3, 4).astype(dtype)
    kept = {
        "whole": whole,
        "number": whole[1, 1, 1],
        "nothing": whole[:, :0],
        "transposed": whole.T,
        "every other": whole[:, ::2],
        "foreign": whole.astype(np.dtype(dtype).newbyteorder(">")),
    }
    same(store.load(store.save(tmp_path, 1, kept, {}))[0], kept)


def test_numbers_that_are_not(tmp_path):
    kept = {"x": np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])}
    loaded = store.load(store.save(tmp_path, 1, kept, {}))[0]
    assert loaded["x"].tobytes() == kept["x"].tobytes()


def test_nothing_at_all(tmp_path):
    assert store.load(store.save(tmp_path, 0, {}, {})) == ({}, {}, 0)


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), np.array([1j])])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(CheckpointError):
        store.save(tmp_path, 1, {"x": value}, {})
    assert list(tmp_path.iterdir()) == []


def test_facts_that_are_not_json_leave_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        store.save(tmp_path, 1, tensors(), {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, seed=0)
    assert is_sound(save(tmp_path, seed=1), seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000400"]


def test_steps_of_more_than_eight_digits(tmp_path):
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        store.save(tmp_path, step, {}, {})
    assert [read_manifest(path)["step"] for path in store.listing(tmp_path)] == [
        99_999_999, 100_000_000, 1_000_000_000,
    ]  # fmt: skip


# Damage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A checkpoint to be damaged, and the bytes that its files had."""
    path = save(tmp_path_factory.mktemp("victim"))
    return path, {name: (path / name).read_bytes() for name in ("shard-0000.safetensors", "manifest.json")}


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        store.load(path)
    assert caught.value.exit_code == 77
    return str(caught.value)


@pytest.mark.parametrize("name", ["shard-0000.safetensors", "manifest.json"])
@settings(max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed_or_changes_nothing(victim, name, place, bit):
    path, whole = victim
    raw = bytearray(whole[name])
    raw[int(place * len(raw))] ^= 1 << bit
    try:
        (path / name).write_bytes(raw)
        assert is_sound(path)  # \u00E9 is \u00e9
    except CheckpointError:
        pass
    finally:
        (path / name).write_bytes(whole[name])


@pytest.mark.parametrize("name", ["shard-0000.safetensors", "manifest.json"])
@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), more=st.binary(min_size=1, max_size=9))
def test_any_truncation_or_addition_is_noticed(victim, name, place, more):
    path, whole = victim
    try:
        for raw in (whole[name][: int(place * len(whole[name]))], whole[name] + more.strip() + b"x"):
            (path / name).write_bytes(raw)
            refused(path)
    finally:
        (path / name).write_bytes(whole[name])


@pytest.mark.parametrize("name", ["shard-0000.safetensors", "manifest.json"])
def test_files_that_are_missing_or_folders(tmp_path, name):
    path = save(tmp_path)
    (path / name).unlink()
    assert "No such file" in refused(path)
    (path / name).mkdir()
    refused(path)
    assert "cannot read" in refused(tmp_path / "nowhere")


# Strangers ----------------------------------------------------------------------------------------


def entry(**changes):
    raw = np.zeros(3, np.float32).tobytes()
    place = {"file": "shard-0000.safetensors", "offset": 0, "bytes": 12}
    return {"name": "x", "shape": [3], "dtype": "float32", **place, "crc32": zlib.crc32(raw), **changes}


def manifest(*entries, **changes):
    made = {"format": FORMAT, "version": VERSION, "step": 3, "tensors": list(entries), "facts": {}}
    return {key: value for key, value in {**made, **changes}.items() if value is not ...}


def signed(made):
    """With its own sum, so that it is refused for what it says."""
    return {**made, "crc32": crc32_of(made)} if isinstance(made, dict) else made


def shard(made, size):
    """What would belong to a manifest, of so many zeros."""
    try:
        return header(made["tensors"]) + bytes(size)
    except (LookupError, TypeError):
        return bytes(size)


EMPTY_CRC = zlib.crc32(b"")
DEEP = "[" * 100_000

HOSTILE = {
    "empty": "",
    "not text": b"\xff\xfe\x00",
    "not json": "{",
    "nested too deep": DEEP,
    "null": "null",
    "a list": "[]",
    "a number": "3",
    "a number of 5000 digits": "9" * 5000,
    "another format": manifest(format="zip"),
    "no format": manifest(format=...),
    "another version": manifest(version=VERSION + 1),
    "version true": manifest(version=[1]),
    "no step": manifest(step=...),
    "negative step": manifest(step=-1),
    "step of text": manifest(step="3"),
    "step true": manifest(step=True),
    "step 1.5": manifest(step=1.5),
    "facts a list": manifest(facts=[]),
    "no facts": manifest(facts=...),
    "tensors a mapping": manifest(tensors={}),
    "no tensors": manifest(tensors=...),
    "entry null": manifest(None),
    "entry a list": manifest([]),
    "no name": manifest({"shape": [3]}),
    "name a number": manifest(entry(name=3)),
    "shape a number": manifest(entry(shape=3)),
    "shape of text": manifest(entry(shape=["3"])),
    "shape true": manifest(entry(shape=[3, True])),
    "shape of fractions": manifest(entry(shape=[3.0])),
    "shape null": manifest(entry(shape=None)),
    "negative shape": manifest(entry(shape=[-3])),
    "two negative lengths": manifest(entry(shape=[-1, -3])),
    "shape too small": manifest(entry(shape=[2])),
    "huge shape": manifest(entry(shape=[2**62])),
    "huge shape and size": manifest(entry(shape=[2**62], bytes=2**64)),
    "product that would wrap to 3": manifest(entry(shape=[2**32, 2**32, 3])),
    "huge but empty": manifest(entry(shape=[0, 2**70], bytes=0, crc32=EMPTY_CRC)),
    "huge but empty, 62 bits": manifest(entry(shape=[0, 2**62, 8], bytes=0, crc32=EMPTY_CRC)),
    "too many dimensions": manifest(entry(shape=[3] + [1] * 99)),
    "far too many dimensions": manifest(entry(shape=[2] * 100_000)),
    "dtype object": manifest(entry(dtype="object")),
    "dtype O": manifest(entry(dtype="O")),
    "dtype of another order": manifest(entry(dtype=">f4")),
    "dtype a list": manifest(entry(dtype=["float32"])),
    "dtype of fields": manifest(entry(dtype="f4,f4")),
    "dtype null": manifest(entry(dtype=None)),
    "negative size": manifest(entry(bytes=-12)),
    "size null": manifest(entry(bytes=None)),
    "size true": manifest(entry(shape=[], dtype="bool", bytes=True)),
    "size of another shape": manifest(entry(bytes=8)),
    "sizes that add up only together": manifest(entry(bytes=24), entry(name="y", bytes=-12)),
    "no file": manifest(entry(file=None)),
    "a file of another version": manifest(entry(file="shard-0000.bin")),
    "the file of the first version": manifest(entry(file="tensors.bin")),
    "a file of safetensors in another version": manifest(entry(), version=2),
    "a file elsewhere": manifest(entry(file="../shard-0000.safetensors")),
    "a file at the root": manifest(entry(file="/shard-0000.safetensors")),
    "a file in a folder": manifest(entry(file="a/shard-0000.safetensors")),
    "a file of a long name": manifest(entry(file="shard-" + "0" * 300 + ".safetensors")),
    "a name that ends in a new line": manifest(entry(file="shard-0000.safetensors\n")),
    "digits of another script": manifest(entry(file="shard-\u0660\u0660\u0660\u0660.safetensors")),
    "the manifest as a shard": manifest(entry(file="manifest.json")),
    "no offset": manifest(entry(offset=None)),
    "negative offset": manifest(entry(offset=-4)),
    "offset of a fraction": manifest(entry(offset=0.0)),
    "offset false": manifest(entry(offset=False)),
    "a gap before it": manifest(entry(offset=4)),
    "offset far away": manifest(entry(offset=2**70)),
    "two in one place": manifest(entry(), entry(name="y")),
    "two that overlap in a file of the right size": manifest(
        entry(shape=[2], bytes=8, crc32=zlib.crc32(bytes(8))),
        entry(name="y", shape=[1], bytes=4, offset=4, crc32=zlib.crc32(bytes(4))),
    ),
    "another shard that is not there": manifest(entry(), entry(name="y", file="shard-0001.safetensors")),
    "no crc32": manifest({k: v for k, v in entry().items() if k != "crc32"}),
    "crc32 of text": manifest(entry(crc32="0")),
    "crc32 too large": manifest(entry(crc32=2**40)),
    "named twice": manifest(entry(bytes=0, shape=[0], crc32=EMPTY_CRC), entry()),
    "more than the file holds": manifest(entry(), entry(name="y")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(tmp_path, name):
    made = HOSTILE[name]
    raw = made if isinstance(made, str | bytes) else json.dumps(signed(made))
    (tmp_path / "manifest.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    (tmp_path / "shard-0000.safetensors").write_bytes(shard(made, 0 if "but empty" in name else 12))
    assert str(tmp_path) in refused(tmp_path)


def test_the_manifest_that_the_hostile_ones_are_made_of_has_no_other_fault(tmp_path):
    written = store.save(tmp_path, 3, {"x": np.zeros(3, np.float32)}, {})
    real = json.loads((written / "manifest.json").read_text())
    ours = manifest(entry())
    assert {key: real[key] for key in ours} == ours
    assert real == signed(ours)


def test_a_manifest_of_a_billion_bytes_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(10**9)  # sparse: takes no room on the disk
    (tmp_path / "shard-0000.safetensors").write_bytes(b"")
    refused(tmp_path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100)
@given(
    size=st.sampled_from([0, 12]),
    at=st.sampled_from("format version step tensors name shape dtype file offset bytes crc32".split()),
    value=json_values,
)
def test_any_value_anywhere(tmp_path_factory, size, at, value):
    folder = tmp_path_factory.getbasetemp() / "any-value"
    folder.mkdir(exist_ok=True)
    here = entry() if size else entry(shape=[0], bytes=0, crc32=EMPTY_CRC)
    made = manifest({**here, at: value}) if at in here else manifest(here, **{at: value})
    (folder / "manifest.json").write_text(json.dumps(signed(made)))
    (folder / "shard-0000.safetensors").write_bytes(shard(made, size))
    try:
        loaded, _, step = store.load(folder)
    except CheckpointError:
        return
    assert step >= 0
    assert sum(array.nbytes for array in loaded.values()) in (0, 12)
    assert all(math.prod(array.shape) in (0, 3) for array in loaded.values())


def test_what_is_no_plain_file_is_not_read(tmp_path):
    path = save(tmp_path / "run")
    shard, elsewhere = path / "shard-0000.safetensors", tmp_path / "elsewhere"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    refused(path)
    shard.unlink()
    os.mkfifo(shard)  # which would be waited for
    assert "it is a named pipe, not a regular file" in refused(path)


# Shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_it_does_not_matter_how_many_have_written(tmp_path, count):
    """Also more than there are tensors: some have nothing to write."""
    smallest_first = dict(reversed(tensors().items()))  # and the first writer gets the largest
    path = store.save(tmp_path, 400, smallest_first, FACTS, count)
    same(store.load(path)[0], smallest_first)
    assert len(list(path.glob("shard-*.safetensors"))) == count
    assert [one.name for one in path.glob("*.json")] == ["manifest.json"]
    entries = read_manifest(path)["tensors"]
    assert len({one["file"] for one in entries}) == min(count, 3)


def test_a_shard_is_a_file_of_safetensors(tmp_path):
    """With nothing of ours: names with slashes, bfloat16, and each tensor where its type may lie."""
    kept = {
        "weights/0000/odd": np.arange(3, dtype=np.int8),
        "weights/0001/short": np.arange(5).astype("bfloat16"),
        **tensors(),
        "weights/0002/nothing": np.zeros((0, 4), np.float16),
        "weights/0003/é": np.array(True),
    }
    path = store.save(tmp_path, 1, kept, FACTS, 2)
    found = {}
    for name in ("shard-0000.safetensors", "shard-0001.safetensors"):
        found |= safetensors.numpy.load_file(path / name)
    same({name: found[name] for name in kept}, kept)
    for one in read_manifest(path)["tensors"]:
        assert one["offset"] % np.dtype(one["dtype"]).itemsize == 0
    assert safetensors.numpy.load_file(store.save(tmp_path, 2, {}, {}) / "shard-0000.safetensors") == {}


def test_a_shard_that_says_something_else_than_the_manifest(tmp_path):
    path = save(tmp_path)
    shard = path / "shard-0000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"0000/embedding", b"0009/embedding"))
    assert "its header is not that of the manifest" in refused(path)
    with pytest.raises(CheckpointError, match="its header"):
        store.verify(path)


def test_what_was_not_promised_is_not_written(tmp_path):
    spec = shards.TensorSpec(0, "x", (3,), "float32")
    for number, array in enumerate((np.zeros(2, np.float32), np.zeros(3, np.int32))):
        with pytest.raises(CheckpointError, match="not as it was promised"):
            shards.write_shard(tmp_path, number, [spec], [(0, "x", array)])


@given(
    sizes=st.lists(st.integers(0, 1000), max_size=30),
    writers=st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True),
)
def test_bytes_are_dealt_evenly(sizes, writers):
    of = shards.assign(sizes, writers)
    assert len(of) == len(sizes) and set(of) <= set(writers)
    loads = [sum(size for size, rank in zip(sizes, of, strict=True) if rank == one) for one in writers]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.parametrize("what", ["missing", "short"])
def test_a_shard_is_missing(tmp_path, what):
    older = store.save(tmp_path, 200, tensors(), FACTS, 2)
    path = store.save(tmp_path, 400, tensors(), FACTS, 2)
    shard = path / "shard-0001.safetensors"
    shard.unlink() if what == "missing" else shard.write_bytes(shard.read_bytes()[:-1])
    assert "shard-0001.safetensors" in refused(path)
    assert store.newest(tmp_path) == older


# Several ------------------------------------------------------------------------------------------


def inject_nan(path):
    raw = bytearray((path / "shard-0000.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "shard-0000.safetensors").write_bytes(raw)


def test_newest_walks_back_to_the_last_sound_one(tmp_path, told):
    assert store.newest(tmp_path / "none") is None
    assert store.newest(tmp_path) is None
    paths = [save(tmp_path, step) for step in (200, 400, 600)]
    assert store.newest(tmp_path) == paths[2]
    assert told.messages == []
    inject_nan(paths[2])
    (paths[1] / "manifest.json").unlink()
    assert store.newest(tmp_path) == paths[0]
    assert [line.split(":")[0] for line in told.messages] == [
        "skipping step-00000600",
        "skipping step-00000400",
    ]
    inject_nan(paths[0])
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints .* --resume never"):
        store.newest(tmp_path)


def test_listing_knows_checkpoints_by_their_names(tmp_path):
    for step in (1000, 20, 300):
        save(tmp_path, step)
    for name in ("step-7", "step-00000020.bak", ".tmp-step-00000400-77-ab", "best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in store.listing(tmp_path)] == [
        "step-00000020", "step-00000300", "step-00001000",
    ]  # fmt: skip
    assert store.listing(tmp_path / "none") == []


def test_prune_keeps_the_newest_and_removes_what_is_half_written(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    half = tmp_path / ".tmp-step-00000005-77-ab"
    half.mkdir()
    (half / "shard-0000.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("the user's own")
    store.prune(tmp_path, 2, step=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "notes.txt",
        "step-00000003",
        "step-00000004",
    ]
    store.prune(tmp_path, 5, step=4)
    assert len(store.listing(tmp_path)) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_never_prefers_damaged_checkpoints_to_sound_ones(tmp_path, keep):
    # Steps 600 and 800 were damaged, the run went on from 400, and a signal had it saved at 500.
    for step in (400, 500, 600, 800):
        save(tmp_path, step)
    for step in (600, 800):
        inject_nan(tmp_path / f"step-{step:08d}")
    store.prune(tmp_path, keep, step=500)
    assert store.newest(tmp_path).name == "step-00000500"


def test_what_a_killed_job_left_is_no_checkpoint(tmp_path):
    path = save(tmp_path, 400)
    path.rename(tmp_path / ".tmp-step-00000400-77-ab")
    assert store.newest(tmp_path) is None
    assert is_sound(save(tmp_path, 400))


# A full disk --------------------------------------------------------------------------------------

FILLED = """
    import resource, sys
    from pathlib import Path

    import numpy as np

    from tf_dist.checkpoint import store
    from tf_dist.errors import CheckpointError

    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        store.save(folder, 600, {"x": np.ones(int(sys.argv[3]), np.float32)}, {"note": "n" * 3000})
    except CheckpointError as error:
        print(error)
        sys.exit(error.exit_code)
"""


# No room for the tensors, for the last of them, or for the manifest alone.
@pytest.mark.parametrize(("limit", "elements"), [(0, 10), (4096, 100_000), (4100, 1026), (2000, 10)])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, limit, elements):
    older = save(tmp_path, 400)
    command = [sys.executable, "-c", textwrap.dedent(FILLED), str(tmp_path), str(limit), str(elements)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode == 77, done.stderr
    assert "Older checkpoints are untouched" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", older.name]
    assert (tmp_path / "latest").read_text() == f"{older.name}\n"
    assert is_sound(store.newest(tmp_path))


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(tmp_path / "checkpoints")
