"""The walk from ``scripts/train.py`` to the line where ranks talk, in a real job: short, as documented."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_FRAMES = 9
# A line of the walk in the documentation: file:function, and what it is for.
DOCUMENTED = re.compile(r"^((?:scripts|tf_dist)/\S+\.py):(\S+) +\S", re.MULTILINE)

# Runs scripts/train.py, and writes the stack of the first barrier in a sum of a training step.
RECORDER = """
import json, os, runpy, sys, traceback
from pathlib import Path

from tf_dist.comm.transport.shared_memory import SharedWindow

script, out, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
make = SharedWindow.__init__


class Node:
    def __init__(self, node):
        self._node = node

    def __getattr__(self, name):
        return getattr(self._node, name)

    def Barrier(self):
        stack = [frame for frame in traceback.extract_stack() if ours(frame.filename)]
        if not out.exists() and any("/strategies/" in frame.filename for frame in stack):
            out.write_text(json.dumps([[str(Path(f.filename).relative_to(root)), f.name] for f in stack]))
        self._node.Barrier()


def ours(name):
    return any(Path(name).is_relative_to(root / folder) for folder in ("scripts", "tf_dist"))


def recording(window, node, *more):
    make(window, node, *more)
    if node.Get_rank() == 0:
        window._node = Node(node)


SharedWindow.__init__ = recording
sys.argv = [script, *sys.argv[4:]]
runpy.run_path(script, run_name="__main__")
"""


def test_the_walk_is_short_and_documented(run_job, small, tmp_path):
    (tmp_path / "recorder.py").write_text(RECORDER)
    found = tmp_path / "walk.json"
    flags = [*small, "--steps", "1", "--run-dir", tmp_path / "run", "--autotune", "off"]
    script = ROOT / "scripts" / "train.py"
    job = run_job(2, tmp_path / "recorder.py", script, found, ROOT, *flags)
    assert job.code == 0, job.output
    walk = [f"{file}:{function}" for file, function in json.loads(found.read_text())]
    print("\n".join(walk))
    assert len(walk) <= MOST_FRAMES, walk
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert walk == [f"{file}:{function}" for file, function in DOCUMENTED.findall(page)]
