"""The scripts of docs/migrating.md, as a reader would run them."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = ["horovod", "horovod-ours", "mwms", "mwms-ours", "mpi4py", "mpi4py-ours"]


def test_there_is_a_pair_for_each():
    assert len(SCRIPTS) == len(NAMES)
    assert ["tf_dist" in script for script in SCRIPTS] == [False, True] * 3


@pytest.mark.parametrize(("name", "script"), list(zip(NAMES, SCRIPTS, strict=True)), ids=NAMES)
def test_script(run_job, tmp_path, name, script):
    if name == "horovod" and importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: `make horovod`")
    path = tmp_path / "script.py"
    path.write_text(script)
    job = run_job(0 if name == "mwms" else 2, path)
    assert job.code == 0, job.output
    losses = [float(found) for found in re.findall(r"loss ([0-9.e-]+)", job.output)]
    assert losses and max(losses) < 1.0, job.output
