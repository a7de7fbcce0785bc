"""The programs of docs/examples on two ranks; those that are scripts share a job."""

import re
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
LONGEST = 50
# Each as `python NAME` runs it, one after another: TensorFlow loads once.
DRIVER = """
import runpy, sys
import tf_dist

comm = tf_dist.connect()
tf_dist.connect = lambda: comm  # once in a process
for name in sys.argv[1:]:
    import keras
    keras.backend.clear_session()
    runpy.run_path(name, run_name="__main__")
"""
# Opens what plain_keras_export.py has saved where there is no tf_dist.
PLAIN = """
import sys
sys.modules["tf_dist"] = None
import keras, numpy as np
text = np.frombuffer(b"the cat sat on the mat. ", np.uint8)[None, :16].astype("int32")
model = keras.saving.load_model("model.keras")
logits = model.predict(text, verbose=0)
model.load_weights("model.weights.h5")
assert np.array_equal(logits, model.predict(text, verbose=0))
print("plain", repr(chr(logits[0, 2].argmax())))
"""
MODELS = ["own_model.py"]  # for `tf-dist train`
SCRIPTS = [name for name in EXAMPLES if name not in MODELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(FOLDER, tmp_path_factory.mktemp("docs") / "examples"))


@pytest.fixture(scope="module")
def said(launcher, folder):
    """What the scripts have printed, all of rank 0."""
    (folder / "driver.py").write_text(DRIVER)
    job = launcher.start(2, "driver.py", *SCRIPTS, cwd=folder).wait()
    assert job.code == 0, job.output
    return job.output


def test_they_are_short_and_listed():
    listed = (FOLDER / "README.md").read_text()
    for name in EXAMPLES:
        lines = (FOLDER / name).read_text().splitlines()
        assert len(lines) < LONGEST and f"[{name}]({name})" in listed, name
        assert any(f"{'tf-dist train' if name in MODELS else name}" in line for line in lines[:6]), name


def test_the_scripts_train(said):
    def number(pattern):
        (found,) = re.findall(pattern, said)  # one rank has said it, once
        return float(found)

    assert number(r"model\.fit on 2 ranks: validation loss (\S+)") < 0.1
    assert number(r"own loop on 2 ranks: loss (\S+)") < 1e-6
    assert number(r"signs of 2 ranks: validation loss (\S+)") < 1.0
    assert 20 <= number(r"stopped at step (\d+) of 200: validation loss") < 200


def test_a_callback_writes_once(said, folder):
    lines = (folder / "losses.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [str(epoch) for epoch in range(len(lines))]
    assert float(lines[-1].split()[1]) < 1.0


def test_what_is_saved_opens_in_plain_keras(launcher, folder, said):
    (folder / "plain.py").write_text(PLAIN)
    job = launcher.start(0, "plain.py", cwd=folder).wait()
    assert job.code == 0, job.output
    assert job.output.strip().endswith("plain ' '") and "after 'the' comes ' '" in said


def test_the_model_trains_by_the_command(launcher, folder, small):
    flags = [*small, "--steps", "4", "--run-dir", "run", "--model", "own_model:build", "--autotune", "off"]
    job = launcher.start(2, "train.py", *flags, cwd=folder).wait()
    assert job.code == 0 and "done at step 4" in job.output, job.output


def test_the_strategy_trains_by_the_command(launcher, folder, small):
    flags = [*small, "--steps", "4", "--run-dir", "signs", "--autotune", "off"]
    job = launcher.start(2, "train.py", *flags, "--strategy", "own_strategy:SignVote", cwd=folder).wait()
    assert job.code == 0 and "by the signs of the majority" in job.output, job.output
    assert "done at step 4" in job.output
