"""The injector: what TF_DIST_FAULT may say, and what it then does, in this process or in a child of it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tf_dist import faults
from tf_dist.errors import UsageError
from tf_dist.faults.injector import Armed
from tf_dist.faults.spec import FOR_EVER, KINDS, PHASES, Fault, parse


@pytest.fixture(autouse=True)
def disarmed():
    yield
    faults.arm("", 0)


def test_what_is_said_is_what_is_meant():
    assert parse("kill:rank=2,step=17,phase=allreduce; slow:rank=1,ms=200;;nan") == [
        Fault("kill", "allreduce", rank=2, step=17),
        Fault("slow", "step", rank=1, ms=200, times=FOR_EVER),
        Fault("nan", "gradient"),
    ]
    assert parse("") == []
    assert parse("exit:code=0")[0].code == 0


def test_every_kind_can_strike_in_each_of_its_phases():
    for name, kind in KINDS.items():
        needed = "".join(f",{key}=1" for key in kind.needs)
        for phase in kind.phases:
            assert parse(f"{name}:phase={phase}{needed}")[0].phase == phase in PHASES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kil:rank=1", "there is no kind 'kil': kill, stop"),
        ("kil:rank=1", "Did you mean 'kill'?"),
        ("kill:rnak=1", "there is no key 'rnak': rank, step, phase. Did you mean 'rank'?"),
        ("kill:ms=3", "there is no key 'ms'"),
        ("kill:phase=alreduce", "there is no phase 'alreduce'"),
        ("kill:phase=alreduce", "Did you mean 'allreduce'?"),
        ("nan:phase=save", "nan cannot strike in phase 'save': gradient"),
        ("slow:rank=1", "slow needs ms=N"),
        ("kill:rank", "'rank' is not key=value"),
        ("kill:rank=", "'rank=' is not key=value"),
        ("kill:rank=one", "rank is 'one', not a whole number"),
        ("kill:rank=-1", "rank is -1: it must be at least 0"),
        ("kill:step=0", "step is 0: it must be at least 1"),
        ("kill:rank=1,rank=2", "rank is given twice"),
        ("kill:phase=load,step=3", "no step has been taken"),
        ("partial:call=0", "call is 0: it must be at least 1"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(UsageError) as caught:
        faults.arm(text, 0)
    assert said in str(caught.value) and str(caught.value).startswith("TF_DIST_FAULT '")
    assert caught.value.exit_code == 64


def test_nothing_armed_is_nothing_done():
    faults.arm("  ", 0)
    faults.begin(1, [])
    faults.at("save")
    terms = [np.ones(3, np.float32)]
    faults.inject_nan(terms)
    assert faults.said() == "" and terms[0].tolist() == [1, 1, 1]


def test_only_the_rank_that_is_meant_and_only_once():
    for rank, hit in ((0, False), (1, True)):
        faults.arm("raise:rank=1,step=3,phase=validation", rank)
        assert faults.said() == "raise on rank 1 in phase validation, from step 3 on"
        faults.begin(2, [])
        faults.at("validation")  # too early
        faults.begin(4, [])
        faults.at("update")  # elsewhere
        if hit:
            with pytest.raises(faults.InjectedFault, match="TF_DIST_FAULT: raise on rank 1"):
                faults.at("validation")
        faults.at("validation")


def test_exit():
    faults.arm("exit:code=7", 3)
    with pytest.raises(SystemExit) as caught:
        faults.begin(1, [])
    assert caught.value.code == 7


def test_slow_is_slow_in_each_of_its_steps(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    for text, expected in (("slow:ms=200,step=2", 4), ("slow:ms=200,step=2,times=3", 3)):
        faults.arm(text, 0)
        for step in range(1, 6):
            faults.begin(step, [])
        assert slept == [0.2] * expected
        slept.clear()


def test_nan_is_put_into_one_element_the_same_one_where_a_step_is_taken_again():
    armed = Armed("nan:step=2,times=2,seed=5", 0)
    places = []
    for step in (1, 2, 3, 4, 2):
        terms = [np.ones(50, np.float32), np.ones(50, np.float32)]
        armed.begin(step, [])
        armed.inject_nan(terms)
        assert np.isfinite(terms[1]).all()
        places.append(np.flatnonzero(np.isnan(terms[0])).tolist())
    assert list(map(len, places)) == [0, 1, 1, 0, 1]
    assert places[1] == places[4] != places[2]
    armed.begin(2, [])
    armed.inject_nan([])  # a rank without a micro-batch


class Value(SimpleNamespace):
    def assign(self, array):
        self.value = np.array(array)


@pytest.mark.parametrize("bits", [1, 3])
def test_bits_of_one_weight_are_flipped(bits):
    def flipped(seed):
        weights = [Value(value=np.ones((5, 7), np.float32)), Value(value=np.ones(3, np.float32))]
        armed = Armed(f"bitflip:step=2,phase=forward,bits={bits},seed={seed}", 0)
        for step in (1, 2, 3):
            armed.begin(step, weights)
            armed.at("forward")
        all_bits = np.concatenate([np.unpackbits(one.value.reshape(-1).view(np.uint8)) for one in weights])
        ones = np.unpackbits(np.ones(38, np.float32).view(np.uint8))
        return np.flatnonzero(all_bits != ones)

    found = [flipped(seed) for seed in range(12)]
    assert all(len(places) == bits and len(set(places // 32)) == 1 for places in found)
    assert len({places[0] for places in found}) > 6
    assert flipped(3).tolist() == found[3].tolist()
    with pytest.raises(UsageError, match="no weights"):
        Armed("bitflip", 0).begin(1, [])


CHILD = """
import os, sys
from pathlib import Path
from tf_dist import faults
from tf_dist.errors import CheckpointError, LaunchError
from tf_dist.atomic_io import write_whole
from tf_dist.checkpoint import store
import numpy as np

folder = Path(sys.argv[1])
faults.arm(sys.argv[2], 0)
faults.writes_below(folder)
tensors = {"a": np.ones(30000, np.float32), "b": np.zeros(4, np.int64)}
for step in (1, 2):
    faults.begin(step, [])
    faults.at("save")
    (folder.parent / f"beside-{step}").write_text("not meant")
    try:
        store.save(folder, step, tensors, {})
        write_whole(folder / "status.json", b"{}", LaunchError)
    except (CheckpointError, LaunchError) as error:
        print(error)
    handle = None
    try:
        handle = os.open(folder / f"raw-{step}", os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"12345678")
    except OSError as error:
        print("raw:", error.strerror)
print("found", [path.name for path in store.listing(folder)])
"""


def child(folder, fault):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), fault], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert (folder.parent / "beside-1").read_text() == "not meant"
    return done


def test_a_full_disk_leaves_what_was_there(tmp_path):
    done = child(tmp_path / "run", "diskfull:step=2,phase=save")
    assert done.returncode == 0, done.stderr
    assert "cannot write the checkpoint" in done.stdout and "No space left on device" in done.stdout
    assert "raw: No space left on device" in done.stdout
    assert "found ['step-00000001']" in done.stdout
    assert (tmp_path / "run" / "raw-1").read_bytes() == b"12345678"
    assert (tmp_path / "beside-2").exists()


def test_a_write_is_cut_in_the_middle(tmp_path):
    """The first calls of a save are those of its tensors, of which the first is larger than a buffer."""
    from tf_dist.checkpoint import store

    sizes = []
    for call in (1, 2):
        folder = tmp_path / str(call) / "run"
        folder.parent.mkdir()
        done = child(folder, f"partial:step=2,call={call}")
        assert done.returncode == -9, done.stdout + done.stderr
        (cut,) = folder.glob(".tmp-step-00000002*")
        sizes.append(sum(path.stat().st_size for path in cut.iterdir()))
        assert store.newest(folder).name == "step-00000001"
        assert json.loads((folder / "status.json").read_text()) == {}
    assert 0 < sizes[0] < sizes[1]
