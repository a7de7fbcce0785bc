"""Tables and a picture of canned strategies, and means over meetings and other steps."""

import json

import pytest

from tf_dist.bench import report, strategies, strategies_on_ranks
from tf_dist.config import Config

ALL = {"tokens": 4000, "added_pss": 3e8, "val_accuracy": 0.25}
RUNS = {
    "allreduce": {"points": [[50, 1.0, 5e7, 2.5], [100, 2.0, 1e8, 2.0]], **ALL},
    "diloco 50": {"points": [[50, 0.5, 0.0, 2.6], [100, 1.0, 2e6, 2.1]], **ALL},
    "gossip 1": {"points": [[50, 0.5, 0.0, 2.9], [100, 1.0, 2e6, 2.6]], **ALL},
}


def row_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_losses_and_bytes_are_held_against_plain_sums():
    text = strategies.learn_table({"model": "gpt-0.81M", "ranks": 2, "runs": RUNS})
    assert "steps to 2.50" in text
    plain = ["2.0000", "+0.0", "%", "25.0", "%", "50", "1.0", "2.0", "2,000", "1.000", "1.0", "300"]
    assert row_of(text, "allreduce") == plain
    local = ["2.1000", "+5.0", "%", "25.0", "%", "60", "0.6", "1.0", "4,000", "0.040", "25.0", "300"]
    assert row_of(text, "diloco 50") == local
    assert len(row_of(text, "gossip 1")) == len(local) - 2  # which has not come so far


def test_workers_that_a_master_can_serve():
    run = RUNS["allreduce"] | {"master": {"master_load": 0.25, "updates_per_s": 100.0}}
    text = strategies.masters({"ranks": 3, "runs": {"allreduce": RUNS["allreduce"], "downpour 4": run}})
    assert text.startswith("downpour 4: the master is at work 25 % of the time with 2 workers, 2.5 ms")
    assert "8 workers would keep it busy" in text


def test_ratios_come_last():
    runs = {
        "allreduce": {"step_ms": 400.0, "sent": 4e7, "tokens": 1000},
        "bf16": {"step_ms": 200.0, "sent": 2e7, "tokens": 1000},
        "compute alone": {"step_ms": 100.0, "sent": 0.0, "tokens": 1000},
    }
    text = strategies.hosts_table("1gbit", runs)
    assert row_of(text, "bf16") == ["200", "5,000", "20.00", "2.00", "0.50"]
    slow = {
        "allreduce": {"even_ms": 100.0, "slow_ms": 200.0, "tokens": 1000},
        "downpour 4": {"even_ms": 100.0, "slow_ms": 125.0, "tokens": 1000},
    }
    assert row_of(strategies.slow_table(slow), "downpour 4") == ["10,000", "8,000", "1.60"]


def test_targets_are_read_from_the_newest_that_has_a_part(tmp_path):
    (tmp_path / "strategies").mkdir()
    learn = {"learn": [{"model": "gpt-0.81M", "ranks": 4, "runs": RUNS}]}
    slow = {"slow": {"allreduce": {"slow_ms": 300.0}, "downpour 4": {"slow_ms": 200.0}}}
    few = {"allreduce": {"step_ms": 400.0}, "bf16": {"step_ms": 160.0}, "compute alone": {"step_ms": 100.0}}
    slow["hosts"] = {"1gbit": few, "100mbit": few}  # a run that left out DiLoCo
    for day, part in (("01", learn), ("02", slow)):
        (tmp_path / "strategies" / f"202601{day}-000000.json").write_text(json.dumps(part))
    lines = report.targets(tmp_path).splitlines()
    assert "| DiLoCo H=50, np 4: bytes of allreduce / its bytes | >= 40.00 | 25.00 | missed |" in lines
    assert "| DiLoCo H=50, np 4: loss above that of allreduce | <= 1.0 % | 5.0 % | missed |" in lines
    assert "| np 4, one rank 2x slower: downpour / allreduce | >= 1.30 | 1.50 | met |" in lines
    assert any("20260101-000000.json and" in line and "20260102-000000.json," in line for line in lines)
    assert any("best compressed / plain sums | >= 2.00 | 2.50 | met |" in line for line in lines)
    assert any("DiLoCo, delayed / compute alone" in line and "not measured" in line for line in lines)
    assert sum("LSTM, np 4" in line and "not measured" in line for line in lines) == 2


def test_a_cycle_has_one_meeting():
    values = [10.0, 10.0, 10.0, 110.0] * 3
    assert strategies_on_ranks.mean_of_a_cycle(values, 50) == pytest.approx(12.0)
    assert strategies_on_ranks.mean_of_a_cycle(values, 1) == 10.0


def test_a_stretch_has_steps_of_several_kinds():
    values, kinds = [10.0, 10.0, 90.0, 30.0, 20.0], ["a", "a", "a", "b", "b"]
    assert strategies_on_ranks.mean_of_kinds(values, kinds) == pytest.approx((3 * 10 + 2 * 25) / 5)


def test_every_strategy_is_a_run_that_can_be():
    for name, (update, options) in strategies.NAMES.items():
        assert Config(strategy=update, **options).strategy == update, name


def test_a_picture_has_three_panels(tmp_path):
    pytest.importorskip("matplotlib")
    path = strategies.picture({"model": "gpt-0.81M", "ranks": 2, "runs": RUNS}, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_text_is_split(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abca" * 25)
    train, held_out = strategies_on_ranks.split(path)
    assert (train.size, held_out.size) == (90, 10)
    assert set(train.tolist()) == {0, 1, 2}
