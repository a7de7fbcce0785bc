"""Campaign against checkpoints: kills during a save, flipped bits, truncated files, malformed manifests.

Each campaign runs in a child process, which has no MPI and no TensorFlow, so that it may be killed, and may
do no harm: it counts attempts to run code, to start programs and to open files elsewhere.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist import atomic_io
from tf_dist.bench import runner
from tf_dist.checkpoint import shards, store
from tf_dist.checkpoint.manifest import crc32_of
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.errors import CheckpointError

FLIPS, MANIFESTS = 1_000, 10_000
SHARDS = 2
# What a child may take beyond what it begins with.
MEMORY_BYTES = 256 << 20
HARM = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 62, 1e308, "", "../../etc/passwd", "/etc/passwd", "float32", "object", "\0",
    "shard-0001.safetensors", "../shard-0000.safetensors", "shard-0000.safetensors/../../x", "tensors.bin",
    [], {}, [1 << 40] * 40, [-3, 2], [[1]], {"a": 1},
)  # fmt: skip


def main(flipped: int = FLIPS, mutated: int = MANIFESTS) -> dict[str, Any]:
    """All campaigns, with so many damaged checkpoints and manifests; what they have found, by name."""
    campaigns: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": kills,
        "flips": partial(flips, flipped),
        "manifests": partial(manifests, mutated),
    }
    return {name: in_a_child(campaign) for name, campaign in campaigns.items()}


def sound(found: dict[str, Any]) -> bool:
    """Whether nothing was lost, nothing went unnoticed, and nothing was done that must not be."""
    killed, flipped, mutated = (found[name] for name in ("kills", "flips", "manifests"))
    return bool(
        killed.get("sound") == killed.get("calls", -1)
        and flipped.get("noticed", 0) + flipped.get("harmless", 0) == flipped.get("tried", -1)
        and mutated.get("refused", 0) + mutated.get("read", 0) == mutated.get("tried", -1)
        and mutated["harm"] == []
    )


def table(found: dict[str, Any]) -> str:
    """A line for each campaign."""
    killed, flipped, mutated = (found[name] for name in ("kills", "flips", "manifests"))
    rows = [
        [
            "killed at each call of a save",
            f"{killed.get('sound')} of {killed.get('calls')}",
            "a sound one is found",
        ],
        ["bits flipped, files cut", f"{flipped.get('noticed')} of {flipped.get('tried')}", "noticed"],
        [
            "manifests mutated",
            f"{mutated.get('refused')} of {mutated.get('tried')}",
            f"refused, {mutated.get('read')} read; harm: {mutated.get('harm')}",
        ],
    ]
    return runner.table(["checkpoints", "", ""], rows)


def in_a_child(campaign: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run a campaign in a folder and a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "found.json"
        child = os.fork()
        if child == 0:
            try:
                out.write_text(json.dumps(campaign(folder)))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return dict(json.loads(out.read_text())) if out.exists() else {"ended": "badly"}


def tensors(step: int) -> dict[str, np.ndarray]:
    """What a checkpoint of ours holds."""
    values = np.random.default_rng(step).standard_normal((40, 25)).astype(np.float32)
    return {"weights/0000/kernel": values, "optimizer/0000/iteration": np.asarray(step, np.int64)}


def holds(path: Path, step: int) -> bool:
    """Whether a checkpoint can be read, and is as it was written."""
    found, facts, at = store.load(path)
    wanted = tensors(step)
    same = all(np.array_equal(found[name], wanted[name]) for name in wanted)
    return same and list(found) == list(wanted) and (at, facts) == (step, {"tokens": step})


def save(folder: Path, step: int) -> None:
    """Write a checkpoint, as two ranks would, the one after the other."""
    store.save(folder, step, tensors(step), {"tokens": step}, SHARDS)


# Kills ------------------------------------------------------------------------------------------------


def kills(folder: Path) -> dict[str, Any]:
    """Save a second checkpoint, and be killed at the k-th call, for all k: both are sound, or the older one.

    Each write is cut in the middle. sound: how often the newest that is found is as it was written, and the
    older one as well.
    """
    found = {"calls": 0, "sound": 0, "new": 0}
    while True:
        shutil.rmtree(folder / "run", ignore_errors=True)
        save(folder / "run", 1)
        if not _killed_at(found["calls"] + 1, folder / "run"):
            return found
        found["calls"] += 1
        with shown_by(lambda line: None):  # what is skipped is expected here
            newest = store.newest(folder / "run")
        if newest is not None and holds(folder / "run" / "step-00000001", 1):
            step = int(newest.name.removeprefix("step-"))
            found["new"] += step == 2
            found["sound"] += holds(newest, step)


def _killed_at(call: int, folder: Path) -> bool:
    """Whether a child that saves step 2 came to so many calls."""
    child = os.fork()
    if child == 0:
        try:
            _count_calls(call)
            save(folder, 2)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _count_calls(last: int) -> None:
    """Let this process be killed at a call that changes files."""
    made = 0

    def called() -> None:
        nonlocal made
        made += 1
        if made == last:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, _after(called, getattr(os, name)))
    for module in (shards, atomic_io):
        setattr(module, "open", partial(_Cut, called))  # noqa: B010 - a module has no such name of its own


def _after(called: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **words: Any) -> Any:
        called()
        return function(*arguments, **words)

    return both


class _Cut:
    """A file of which each write is two."""

    def __init__(self, called: Callable[[], None], *arguments: Any) -> None:
        self._called, self._file = called, builtins.open(*arguments)

    def __enter__(self) -> _Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        """Write a half, and then the other one."""
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._called()
        self._file.write(data[len(data) // 2 :])


# Damage -----------------------------------------------------------------------------------------------


def flips(count: int, folder: Path) -> dict[str, Any]:
    """Flip a bit, or cut a file, anywhere in a checkpoint. noticed: by an error of ours."""
    chance, found = random.Random(1), {"tried": count, "noticed": 0, "harmless": 0}  # noqa: S311
    save(folder, 3)
    path = folder / "step-00000003"
    whole = {one.name: one.read_bytes() for one in sorted(path.iterdir())}
    for _ in range(count):
        name = chance.choice(list(whole))
        raw = bytearray(whole[name])
        if chance.random() < 0.2:
            del raw[chance.randrange(len(raw)) :]
        else:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (path / name).write_bytes(raw)
        try:
            found["harmless"] += holds(path, 3)
        except CheckpointError:
            found["noticed"] += 1
        (path / name).write_bytes(whole[name])
    return found


def manifests(count: int, folder: Path) -> dict[str, Any]:
    """Change manifests, most with a right checksum. refused: by an error of ours. harm: what must not be."""
    chance, harm = random.Random(2), list[str]()  # noqa: S311
    found: dict[str, Any] = {"tried": count, "refused": 0, "read": 0, "other errors": 0}
    save(folder, 3)
    path = folder / "step-00000003"
    whole = json.loads((path / "manifest.json").read_text())
    _watch(folder, harm)
    for _ in range(count):
        (path / "manifest.json").write_bytes(_mutated(whole, chance))
        try:
            store.load(path)
            found["read"] += 1
        except CheckpointError:
            found["refused"] += 1
        except Exception:  # what is counted here
            found["other errors"] += 1
    return {**found, "harm": harm}


def _mutated(whole: dict[str, Any], chance: random.Random) -> bytes:
    manifest = json.loads(json.dumps(whole))
    for _ in range(chance.randint(1, 3)):
        _change(manifest, chance)
    if chance.random() < 0.8:
        manifest.pop("crc32", None)
        manifest["crc32"] = crc32_of(manifest)
    raw = bytearray(json.dumps(manifest).encode())
    if chance.random() < 0.1:
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return bytes(raw)


def _change(value: Any, chance: random.Random) -> None:
    """Put an odd value somewhere into a manifest, leave something out, or add it twice."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = chance.choice(places)
        inner = value[place]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
            value = inner
            continue
        what = chance.random()
        if what < 0.7:
            value[place] = json.loads(json.dumps(chance.choice(ODD_VALUES)))
        elif what < 0.85:
            del value[place]
        elif isinstance(value, list):
            value.append(json.loads(json.dumps(inner)))
        else:
            value[f"{place}2"] = json.loads(json.dumps(inner))
        return


def _watch(folder: Path, harm: list[str]) -> None:
    """Write down what this process does that reading a checkpoint must not."""
    inside = str(folder.resolve())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in HARM or (event == "import" and "pickle" in str(arguments[0])):
            harm.append(event)
        if event == "open" and isinstance(arguments[0], str) and not _within(arguments[0], inside):
            harm.append(f"open {arguments[0]}")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    sys.addaudithook(hook)


def _within(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(folder)


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
