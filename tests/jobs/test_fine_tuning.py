"""Fine-tuning as a user does it: pre-training, then LoRA on other ranks, resumed, and exported."""

import json

import numpy as np


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_lora_on_a_run_of_ones_own(launcher, small, tmp_path):
    first = launcher.start(0, "train.py", *small, "--steps", "3", "--run-dir", "old", cwd=tmp_path).wait()
    assert first.code == 0, first.output

    flags = [flag for flag in small if flag not in ("--tokenizer", "byte")]  # it comes with the weights
    constant = ["--schedule", "constant", "--warmup-steps", "1"]  # else it depends on the number of steps
    tuned = ["train.py", *flags, *constant, "--init-from", "old", "--lora-rank", "2"]
    tuned += ["--layer-lr-decay", "0.5"]
    for ranks in (0, 2):
        run = launcher.start(ranks, *tuned, "--steps", "4", "--run-dir", f"new-{ranks}", cwd=tmp_path).wait()
        assert run.code == 0, run.output
        assert "16 of 24 weights; 8 new: layer_0_attention/query_key_value/kernel_lora_a" in run.output
        assert " parameters are trained" in run.output
    # The same bits, however many ranks; and again where a run resumes, which does not look at the old one.
    whole = status(tmp_path / "new-0")["weights_sha256"]
    assert status(tmp_path / "new-2")["weights_sha256"] == whole
    half = ["--run-dir", "half"]
    begun = launcher.start(2, *tuned, *half, "--steps", "2", cwd=tmp_path).wait()
    assert begun.code == 0, begun.output
    (tmp_path / "old").rename(tmp_path / "gone")
    run = launcher.start(2, "train.py", *half, "--steps", "4", cwd=tmp_path).wait()
    (tmp_path / "gone").rename(tmp_path / "old")
    assert run.code == 0, run.output
    assert "resumed at step 2" in run.output and "initial weights" not in run.output
    assert status(tmp_path / "half")["weights_sha256"] == whole

    wrong = launcher.start(0, *tuned, "--tokenizer", "char", "--run-dir", "no", cwd=tmp_path).wait()
    assert wrong.code == 77 and "its weights know another tokenizer than 'char'" in wrong.output
    wrong = launcher.start(0, *tuned, "--width", "32", "--run-dir", "no", cwd=tmp_path).wait()
    assert wrong.code == 77 and "embedding/embeddings is [" in wrong.output

    (step,) = (tmp_path / "old" / "checkpoints").glob("step-*")
    (later,) = (tmp_path / "new-0" / "checkpoints").glob("step-*")
    from tf_dist.checkpoint.store import load

    before, after = load(step)[0], load(later)[0]
    after = {name.split("/", 2)[-1]: array for name, array in after.items()}
    for name, array in before.items():
        if name.startswith("weights/"):
            np.testing.assert_array_equal(after[name.split("/", 2)[-1]], array, err_msg=name)
