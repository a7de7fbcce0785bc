"""Packed documents of a mixture, as a user trains, resumes, evaluates and asks for text."""

import json

import pytest

MIXED = ("--data", "many.jsonl:0.75", "few:0.25", "--documents", "packed", "--tokenizer", "byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("mixture")
    lines = [json.dumps({"text": f"number {i} of many"}) for i in range(150)]
    (made / "many.jsonl").write_text("\n".join(lines))
    (made / "few").mkdir()
    for i in range(8):
        (made / "few" / f"{i}.txt").write_text(f"text {i} of few\n" * 3)
    return made


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sha256(run):
    return json.loads((run / "status.json").read_text())["weights_sha256"]


def test_one_rank_two_ranks_and_a_resume(launcher, small, folder):
    flags = [*small, *MIXED, "--threads-per-rank", "1", "--save-every", "6"]
    # A cosine would end elsewhere with other --steps.
    flags += ["--eval-every", "6", "--schedule", "constant"]
    one = launcher.start(1, "train.py", *flags, "--steps", "12", "--run-dir", "one", cwd=folder).wait()
    assert one.code == 0, one.output
    asked = [[*flags, "--steps", steps, "--run-dir", "two"] for steps in ("6", "12")]
    two = launcher.several(2, "train.py", asked, cwd=folder).wait()
    assert two.code == 0, two.output
    assert sha256(folder / "one") == sha256(folder / "two")

    assert "mixture   0.75 of many, " in one.output and "; 0.25 of few, " in one.output
    assert "each of which is seen by itself" in one.output
    last = rows(folder / "one")[-1]
    wanted = 0.75 * last["val_loss_many"] + 0.25 * last["val_loss_few"]
    assert last["val_loss"] == pytest.approx(wanted) and last["bits_per_byte"] is None
    assert last["epoch_few"] > last["epoch_many"] > 0
    assert f"epochs of each corpus: many {last['epoch_many']:.2f}, few {last['epoch_few']:.2f}" in one.output

    evaluated = launcher.start(0, "evaluate.py", "--run-dir", "one", cwd=folder).wait()
    assert evaluated.code == 0, evaluated.output
    found = json.loads(evaluated.output.strip().splitlines()[-1])
    assert found["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert found["val_loss_few"] == pytest.approx(last["val_loss_few"], rel=1e-5)


def test_what_does_not_go_together_is_said_before_anything_is_read(launcher, folder):
    asked = launcher.start(
        0, "train.py", "--data", "nothing", "--model", "lstm", "--documents", "packed", cwd=folder
    ).wait()
    assert asked.code == 64 and "documents windows" in asked.output
    asked = launcher.start(0, "train.py", "--data", "many.jsonl:0.5", "few", cwd=folder).wait()
    assert asked.code == 64 and "--data few has no weight" in asked.output
