"""Files of somebody else: what is read of them, what is refused, and that nobody opens them otherwise."""

import ast
import os
import socket
from pathlib import Path

import pytest

from tf_dist import untrusted_files as files

ROOT = Path(__file__).parents[1]


@pytest.fixture
def odd(tmp_path):
    """``odd(kind)``: the path of something in place of a file."""

    def make(kind):
        path = tmp_path / kind
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "link":
            (tmp_path / "target").write_text("precious")
            path.symlink_to(tmp_path / "target")
        elif kind == "dangling link":
            path.symlink_to(tmp_path / "made by nobody")
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        return path

    return make


KINDS = ("pipe", "folder", "device", "link", "dangling link", "socket")


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_of_the_folder_are_read(odd, kind):
    with pytest.raises(OSError, match=r"it is a|No such device") as caught:
        files.read_bytes(odd(kind), 100, follow=False)
    assert caught.value.strerror


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("open_it", [files.opened_to_append, files.opened_to_lock])
def test_only_regular_files_of_the_folder_are_written(odd, kind, open_it, tmp_path):
    path = odd(kind)
    with pytest.raises(OSError):
        open_it(path)
    assert not (tmp_path / "made by nobody").exists()
    assert kind != "link" or (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_a_link_that_a_user_names_leads_to_a_regular_file(odd, kind):
    with pytest.raises(OSError):
        files.read_bytes(odd(kind), 100, follow=True)


def test_a_link_that_a_user_names_is_followed(odd):
    assert files.read_bytes(odd("link"), 100, follow=True) == b"precious"


def test_what_has_another_name_is_not_written(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    os.link(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(OSError, match="hard link"):
        files.append(tmp_path / "ours", b"more")
    assert (tmp_path / "theirs").read_text() == "precious"


def test_appending_makes_a_file_and_adds_to_it(tmp_path):
    before = os.umask(0o027)
    try:
        files.append(tmp_path / "log", b"one\n")
        files.append(tmp_path / "log", b"two\n")
    finally:
        os.umask(before)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * 101)
    assert len(files.read_bytes(path, 101, follow=False)) == 101
    with pytest.raises(OSError, match="larger than 100 bytes"):
        files.read_bytes(path, 100, follow=False)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 65 + "]" * 65, '{"a":' * 70 + "1" + "}" * 70, b"\xff", "{"]
)
def test_json_that_cannot_be(text):
    with pytest.raises(ValueError):
        files.parsed_json(text)


def test_json_that_can_be():
    assert files.parsed_json("[" * 64 + "]" * 64)
    assert files.parsed_json(b'{"a": [1, "\\u6cb3"]}') == {"a": [1, "河"]}


def bomb(levels):
    """A kilobyte that stands for 9 ** levels words."""
    lines, last = ['a0: &a0 ["lol", "lol", "lol", "lol", "lol", "lol", "lol", "lol", "lol"]'], "a0"
    for number in range(1, levels):
        lines.append(f"a{number}: &a{number} [{', '.join([f'*{last}'] * 9)}]")
        last = f"a{number}"
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(10), "values, with what aliases repeat"),
        ("a: &a [*a]", "an alias of what is not there yet"),
        ("[" * 30_000, "deep"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 70)), "deep"),
        ("a: " + "1:" * 60_000 + "1", "a number of this length"),
        ("a: 0x" + "f" * 5000, "a number of this length"),
        ("a: 2001-99-99", "month"),
        ("!!python/object/apply:os.system ['true']", "constructor"),
        (b"\xff\xff\xff", "unacceptable"),
        ("x: " + "y" * 2000 + ": z", "mapping values"),
    ],
    ids=range(10),
)
def test_yaml_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        files.parsed_yaml(text)
    assert len(str(caught.value)) < 500


def test_yaml_that_repeats_a_little():
    assert files.parsed_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1},
    }  # fmt: skip


def test_values_in_messages_are_short():
    for value in ("x" * 10**6, [["x" * 1000] * 9] * 9, {"a": "x" * 10**6}, 10**3000):
        assert len(files.shown(value)) < 1000


def test_lines_without_end_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_LIMIT_BYTES", 10)
    path = tmp_path / "lines"
    path.write_bytes(b"short\n" + b"x" * 25 + b"\n" + b"y" * 9 + b"\nlast")
    assert list(files.lines(path)) == [b"short\n", b"x" * 10, b"y" * 9 + b"\n", b"last"]


# Nobody else opens files ---------------------------------------------------------------------------

# Calls that open or parse files. `write_bytes` and the like write through links, `touch` makes files there.
NAMES = {"open", "fdopen", "print", "memmap", "fromfile", "loadtxt", "genfromtxt"}
METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "touch", "safe_load", "fromfile", "memmap"}
OPENERS = {
    ("os", "open"),
    ("io", "open"),
    ("json", "load"),
    ("json", "loads"),
    ("yaml", "load"),
    ("np", "load"),
}
NEW_ONLY = "a new file (O_EXCL) under a temporary name"
KERNEL = "a file of the kernel"
OWN_JSON = "JSON that ranks of one job send each other"
# Who may, and why. A count, so that a further call is looked at.
ALLOWED = {
    "atomic_io.py": ({"open": 3}, NEW_ONLY + "; a folder, to sync it"),
    "untrusted_files.py": ({"open": 1, "fdopen": 1, "loads": 1, "load": 1}, "this is the place"),
    "terminal.py": ({"open": 1}, "/dev/null"),
    "comm/transport/base.py": ({"loads": 1}, OWN_JSON),
    "comm/control_messages.py": ({"loads": 1}, OWN_JSON),
    "comm/runtime/collective_order.py": ({"loads": 1}, OWN_JSON),
    "comm/runtime/job_exit.py": (
        {"loads": 2, "fdopen": 2, "open": 2},
        OWN_JSON + "; its own standard error, that of its mpirun (of /proc), and /dev/null",
    ),
    "comm/runtime/memory_limits.py": ({"read_text": 1}, KERNEL),
    "comm/health/status_board.py": (
        {"open": 2},
        "memory of the job: O_EXCL, 0600; then by that name, O_NOFOLLOW",
    ),
    "comm/runtime/startup.py": ({"read_bytes": 1}, KERNEL),
    "comm/runtime/thread_budget.py": ({"open": 1}, KERNEL),
    "comm/health/watchdog.py": ({"fdopen": 1}, "of `opened_to_append`"),
    "data/download.py": ({"open": 3}, NEW_ONLY + "; an address; a member of an archive"),
    "data/images.py": ({"open": 1}, "bytes of `read_capped`"),
    "data/prepared_dataset.py": ({"fdopen": 1}, "of `opened_to_lock`"),
    "data/tables.py": ({"loads": 1}, "a row of a table, which may be nested as its user likes"),
    "data/recipe_tables.py": ({"open": 1}, NEW_ONLY),
    "data/unpacking.py": ({"open": 4}, "new files (O_EXCL) in a folder of its own; members of an archive"),
    "data/tokens.py": ({"open": 1, "memmap": 1}, NEW_ONLY + "; of `opened`"),
    "data/wav.py": ({"open": 1}, "bytes in memory"),
    "ops/doctor.py": ({"read_text": 1}, KERNEL),
    "faults/writes.py": ({"open": 1}, "/dev/full"),
    "processes.py": ({"read_text": 1, "open": 1}, KERNEL + "; its own terminal"),
    "progress.py": ({"open": 1}, "the terminal of its launcher, a character device of /proc"),
    "run/numerics_environment.py": ({"open": 1}, KERNEL),
    "checkpoint/hdf5_weights.py": ({"open": 2}, NEW_ONLY + "; a member of an archive"),
    "run/run_folder.py": ({"open": 1}, NEW_ONLY),
    "training/checkpoint_manager.py": ({"open": 1}, NEW_ONLY),
    "checkpoint/shards.py": ({"open": 1}, NEW_ONLY),
    "cli/train.py": ({"open": 1}, "of a `RunFolder`"),
}
# Programs for developers of this project, which read what they have just written themselves.
DEVELOPERS = (
    "bench/",
    "cli/bench.py",
    "scripts/build_horovod.py",
    "scripts/check_peers.py",
    "scripts/emulate_cluster.py",
)


def calls_that_open(tree):
    """Names of the calls in a module that open files, parse them, or print."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in NAMES:
            yield function.id
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            of_a_path = function.attr == "open" and owner not in ("os", "io")
            if function.attr in METHODS | {"fdopen"} or (owner, function.attr) in OPENERS or of_a_path:
                yield function.attr


def modules():
    for path in sorted((ROOT / "tf_dist").rglob("*.py")):
        yield str(path.relative_to(ROOT / "tf_dist")), path
    for path in sorted((ROOT / "scripts").glob("*.py")):
        yield f"scripts/{path.name}", path


def test_nobody_else_opens_files_or_prints():
    wrong = {}
    for name, path in modules():
        found = list(calls_that_open(ast.parse(path.read_bytes())))
        counts = {call: found.count(call) for call in sorted(set(found))}
        allowed, _ = ALLOWED.get(name, ({}, ""))
        if not name.startswith(DEVELOPERS) and any(counts[call] > allowed.get(call, 0) for call in counts):
            wrong[name] = counts
    assert not wrong, "read by tf_dist.untrusted_files, write by atomic_io, print by tf_dist.terminal"


def test_calls_that_open_are_found():
    source = "open(x); Path(x).open(); os.open(x, 0); json.load(f); p.read_text(); run.open_(); print(1)"
    assert sorted(calls_that_open(ast.parse(source))) == [
        "load",
        "open",
        "open",
        "open",
        "print",
        "read_text",
    ]
