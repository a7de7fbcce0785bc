"""Eight random scripts of `make fuzz-fit`: equal to plain Keras, or refused before the first step."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz_fit"))

import campaign
from jobs import Runs
from plan import plan_of
from script import script_of

# Of the first twenty, some that have most of their tasks, forms, steps and extras between them.
SEEDS = {2: (1, 3, 7, 9), 3: (11, 15, 17, 20)}


def test_ranks_train_what_one_process_trains(launcher, tmp_path):
    found = campaign.run(SEEDS, Runs(tmp_path, launcher.warm_python()))
    for verdicts in found.values():
        assert all(verdict.good for verdict in verdicts.values()), campaign.table(found, tmp_path)
        words = [verdict.word for verdict in verdicts.values()]
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
