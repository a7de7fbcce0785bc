"""Every mistake in what a user gives: one clear message, once, on any number of ranks, and its exit code."""

import shutil

import pytest

from tf_dist.checkpoint import store


@pytest.fixture
def files(tmp_path, corpus):
    """The bad files, in the folder that the job is started in."""
    (tmp_path / "empty.txt").touch()
    text = corpus.read_bytes()
    (tmp_path / "latin1.txt").write_bytes(text[:5000] + b"caf\xe9 " + text[5000:])
    (tmp_path / "table.csv").write_text("title,body\nfirst,some text\nsecond,more text\n")
    (tmp_path / "run.yaml").write_text("learning_rat: 0.1\n")
    (tmp_path / "list.yaml").write_text("- learning_rate\n")
    (tmp_path / "a-file").write_text("not a folder\n")
    return tmp_path


MISTAKES = {
    "no such file": (["--data", "missing.txt"], 65, ["missing.txt"]),
    "empty file": (["--data", "empty.txt"], 65, ["empty.txt", "no text"]),
    "not UTF-8": (["--data", "latin1.txt"], 65, ["latin1.txt", "0xe9", "offset 5003", "--errors replace"]),
    "missing text column": (["--data", "table.csv"], 65, ["'text'", "title", "body", "--text-column"]),
    "vocabulary too small": (["--vocab-size", "100"], 64, ["100", "257"]),
    "micro-batch that does not divide": (["--micro-batch-size", "3"], 64, ["3", "8", "1, 2, 4, 8"]),
    "unknown key": (["--config", "run.yaml"], 64, ["run.yaml", "'learning_rat'", "'learning_rate'?"]),
    "YAML that is no mapping": (["--config", "list.yaml"], 64, ["list.yaml"]),
    "no such configuration": (["--config", "no.yaml"], 64, ["no.yaml"]),
    "unknown flag": (["--learning-rat", "1"], 64, ["--learning-rat", "'--learning-rate'?"]),
    "word for a number": (["--width", "wide"], 64, ["--width", "'wide'"]),
    "heads that do not divide": (["--heads", "3"], 64, ["heads 3", "width 16"]),
    "run folder that cannot be made": (["--run-dir", "a-file/run"], 78, ["a-file/run", "--run-dir"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(files, run_job, small, one_error, name):
    flags, code, words = MISTAKES[name]
    job = run_job(2, "train.py", *small, "--steps", "2", "--run-dir", "run", *flags, timeout=60)
    one_error(job, code, *words)


def test_a_fault_that_there_is_not(run_job, small, one_error):
    job = run_job(2, "train.py", *small, "--run-dir", "run", timeout=60, env={"TF_DIST_FAULT": "kil:rank=1"})
    one_error(job, 64, "TF_DIST_FAULT 'kil:rank=1'", "Did you mean 'kill'?")


# Those that only a job with TensorFlow can meet ----------------------------------------------------


def test_a_start_that_fails_leaves_no_run(run_job, small, one_error, tmp_path):
    """The optimizer's name is Keras's, so it is found late: `latest` still names the run before."""
    (tmp_path / "runs" / "before").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("before")
    one_error(
        run_job(0, "train.py", *small, "--steps", "2", "--optimizer", "adma"), 64, "'adma'", "Did you mean"
    )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["before", "latest"]
    assert (tmp_path / "runs" / "latest").readlink().name == "before"


def test_fewer_sequences_than_a_batch(run_job, small, one_error):
    job = run_job(2, "train.py", *small, "--steps", "2", "--global-batch-size", "4096", "--run-dir", "run")
    one_error(job, 65, "418 sequences of 16 tokens", "4096", "--global-batch-size")


def test_not_a_number(run_job, small, one_error):
    flags = ["--optimizer", "sgd", "--learning-rate", "1e30", "--clip-norm", "0", "--weight-decay", "0"]
    job = run_job(2, "train.py", *small, *flags, "--warmup-steps", "0", "--steps", "20", "--run-dir", "run")
    one_error(job, 76, "not finite", "--learning-rate")


def test_no_checkpoint_that_is_sound(run_job, first_run, copy_of_first, one_error):
    damaged = store.listing(copy_of_first / "checkpoints")
    (damaged[0] / "manifest.json").write_text("{")
    tensors = damaged[1] / "shard-0000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    before = (copy_of_first / "metrics.jsonl").read_bytes()
    job = run_job(2, "train.py", *first_run.flags, "--run-dir", copy_of_first)
    one_error(job, 77, "none of the 2 checkpoints", "--resume never")
    for path in damaged:
        assert job.output.count(f"skipping {path.name}: ") == 1
    assert (copy_of_first / "metrics.jsonl").read_bytes() == before, "something was lost"


def test_checkpoint_of_another_model(run_job, first_run, copy_of_first, one_error):
    job = run_job(2, "train.py", *first_run.flags, "--run-dir", copy_of_first, "--width", "32")
    one_error(job, 77, "width: 16 -> 32", "--resume never")


def test_bad_bytes_can_be_replaced(files, run_job, small, prepared_dir):
    replace = ["--data", "latin1.txt", "--errors", "replace", "--prepared-dir", prepared_dir]
    job = run_job(0, "prepare.py", *replace, "--tokenizer", "byte")
    assert job.code == 0, job.output
    assert "replaced bad bytes: 1" in job.output
    job = run_job(2, "train.py", *small, *replace, "--steps", "1", "--run-dir", "run")
    assert job.code == 0, job.output
    assert len(list(prepared_dir.glob("latin1-*"))) == 1, "prepared twice"


# The other scripts ---------------------------------------------------------------------------------

OTHERS = {
    "generate without a run": ("generate.py", ["--run-dir", "nothing"], 77, ["nothing", "no run"]),
    "generate with an unknown flag": ("generate.py", ["--temprature", "1"], 64, ["--temprature"]),
    "evaluate without a run": ("evaluate.py", ["--run-dir", "nothing"], 77, ["nothing", "no run"]),
    "evaluate with an unknown flag": ("evaluate.py", ["--run-folder", "x"], 64, ["--run-folder"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_mistake_with_another_script(run_job, one_error, name):
    script, flags, code, words = OTHERS[name]
    job = run_job(2 if script == "evaluate.py" else 0, script, *flags, timeout=60)
    one_error(job, code, *words)


def test_evaluate_with_a_damaged_checkpoint(run_job, copy_of_first):
    """It falls back to the one before, and says so once."""
    *_, newest = store.listing(copy_of_first / "checkpoints")
    shutil.rmtree(newest)
    newest.mkdir()
    job = run_job(2, "evaluate.py", "--run-dir", copy_of_first)
    assert job.code == 0, job.output
    assert "step 40, the held-out text of the run" in job.output
    assert job.output.count(f"skipping {newest.name}") == 1, job.output


def test_a_folder_that_is_in_use(launcher, small, tmp_path, one_error):
    path, flags = tmp_path / "run", [*small, "--run-dir", tmp_path / "run"]
    first = launcher.start(2, "train.py", *flags, "--steps", 100_000, cwd=tmp_path)
    first.wait_until(lambda: (path / "metrics.jsonl").exists())
    second = launcher.start(2, "train.py", *flags, cwd=tmp_path).wait()
    assert first.running()
    first.kill()
    one_error(second, 78, "is in use by process", "--run-dir")
