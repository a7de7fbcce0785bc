"""What is kept beside the tensors of a checkpoint: whoever sends one can compute a sum as well."""

from pathlib import Path

import pytest

from tf_dist.checkpoint.checked_facts import check_facts, check_position
from tf_dist.errors import CheckpointError

SOUND = {
    "tokens": 5, "elapsed_s": 1.5, "tuned": {"xla": False}, "config": {"model": "lstm"}, "content_sha256": "ab",  # noqa: E501
    "versions": {}, "bits_depend_on": {}, "val_loss": 2.5, "bad_steps": [0, 0],
    "spikes": {"skips": [[3, 4]], "losses": [1.0]}, "val_loss_step": None, "row": [0.5, 3, 3, 1],
}  # fmt: skip


def test_what_a_job_keeps():
    check_facts(SOUND, Path("x"))
    check_facts({**SOUND, "content_sha256": None, "val_loss": None}, Path("x"))


def test_older_checkpoints_lack_some():
    check_facts(
        {name: SOUND[name] for name in ("tokens", "elapsed_s", "config", "content_sha256", "val_loss")},
        Path("x"),
    )
    check_position({"tokens": 1, "elapsed_s": 0}, Path("x"))


@pytest.mark.parametrize("name", ["tokens", "elapsed_s", "config", "content_sha256", "val_loss"])
def test_without_these_no_run_goes_on(name):
    with pytest.raises(CheckpointError, match=f"lacks '{name}'"):
        check_facts({key: value for key, value in SOUND.items() if key != name}, Path("x"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": -1}, {"tokens": 1 << 70}, {"tokens": True}, {"elapsed_s": "1"}, {"elapsed_s": float("inf")},  # noqa: E501
        {"elapsed_s": float("nan")}, {"tuned": {}}, {"tuned": None}, {"row": [0, 0, 0]}, {"row": [0, 0, 0, "x"]},  # noqa: E501
        {"row": [0, 0, 0, float("nan")]}, {"bad_steps": [1]}, {"spikes": {"skips": 3}}, {"spikes": []},
        {"spikes": {"losses": ["x"]}}, {"spikes": {"skips": [[1, -1]]}}, {"config": []}, {"content_sha256": 7},  # noqa: E501
        {"val_loss": "low"}, {"bits_depend_on": 1}, {"versions": None}, {"last_row": []},
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_cannot_be(wrong):
    with pytest.raises(CheckpointError, match="which cannot be"):
        check_facts({**SOUND, **wrong}, Path("x"))
