"""Twenty random scripts of `make fuzz-fit`: each equals plain Keras, or is refused before its first step."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz_fit"))

import campaign
from plan import plan_of
from script import script_of

SEEDS = {2: range(1, 11), 3: range(11, 21)}


@pytest.mark.parametrize("ranks", SEEDS)
def test_ranks_train_what_one_process_trains(launcher, tmp_path, ranks):
    found = campaign.run(SEEDS[ranks], [ranks], tmp_path)
    bad = [verdict for verdict in found[ranks].values() if not verdict.good]
    assert not bad, campaign.table(found, tmp_path)
    words = [verdict.word for verdict in found[ranks].values()]
    assert words.count("equal") > len(words) / 2, campaign.table(found, tmp_path)


def test_a_script_is_a_function_of_its_seed():
    texts = [script_of(seed) for seed in range(200)]
    assert texts == [script_of(seed) for seed in range(200)]
    assert len({text.partition("# seed")[2].partition(":")[2] for text in texts}) == 200


def test_every_choice_is_drawn():
    plans = [plan_of(seed) for seed in range(2000)]
    for name, choices in {
        "task": 10,
        "form": 12,
        "step": 5,
        "extra": 8,
        "validation": 7,
        "weights": 5,
    }.items():
        assert len({getattr(plan, name) for plan in plans}) == choices, name
