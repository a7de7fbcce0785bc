"""Tables and pictures from canned results, and the table of targets."""

import json
import sys
from pathlib import Path

import pytest

from tf_dist.bench import comm, exact, exact_cost, memory, nanogpt, parallel, report, runner, scaling, step

sys.path.insert(0, str(Path(__file__).parent))
import canned

PNG = b"\x89PNG"


def lines(text):
    return [line.split() for line in text.splitlines()]


def test_times_of_all_rounds_make_one_median_and_only_the_best_setting_stays():
    done = {
        step.StepJob(1, "ranks"): [canned.step_job(ours=[20.0], gemm=[100.0])],
        step.StepJob(2, "ranks"): [canned.step_job(ours=[10.0, 12.0], gemm=[90.0])] * 2,
        step.StepJob(2, "horovod"): [canned.step_job(horovod=[50.0]), canned.step_job(horovod=[70.0])],
        step.StepJob(2, "horovod", "A=1"): [canned.step_job(horovod=[40.0])],
        step.StepJob(2, "horovod", "HOROVOD_A=1"): [canned.step_job(horovod=[40.0])],
        step.StepJob(2, "horovod", "HOROVOD_A=2"): [canned.step_job(horovod=[30.0])],
        step.StepJob(0, "fit", "plain"): [canned.step_job(fit=[25.0])],
    }
    found = step.summary("tiny-gpt", done)
    medians = {(row["ranks"], row["way"]): row["median_ms"] for row in found["rows"]}
    assert medians[2, "ours"] == 11.0
    assert medians[2, "horovod"] == 60.0
    assert medians[2, "horovod HOROVOD_A=2"] == 30.0
    assert (2, "horovod HOROVOD_A=1") not in medians
    assert found["horovod_sweep_ms"] == {"HOROVOD_A=1": 40.0, "HOROVOD_A=2": 30.0}
    assert medians[0, "fit plain"] == 25.0
    assert all(row["tokens_per_s"] == pytest.approx(1e6 / row["median_ms"]) for row in found["rows"])
    assert "gemm" not in {way for _, way in medians}
    # Each is held against the peak of its own job: 11 ms where products took 90, and 20 ms where 100.
    shares = [found["gemm"][at]["step"] for at in ("np 1", "np 2")]
    assert shares[1] == pytest.approx(shares[0] * (20 / 11) * (90 / 100))


def test_the_table_of_steps_has_the_ratio_last_and_says_what_is_missing():
    text = step.tables("gpt-0.81M", canned.step_model())
    rows = {" ".join(line[:-3]): line[-3:] for line in lines(text)}
    assert rows["np 2, tf_dist"] == ["10.0", "100,000", "1.00"]
    assert rows["np 2, tf_dist, --xla on"][-1] == "0.50"
    assert rows["np 2, Horovod, HOROVOD_CYCLE_TIME=10"][-1] == "4.00"
    assert rows["one process, Keras fit, XLA"][-1] == "1.60"
    assert "not measured: MultiWorkerMirroredStrategy, own loop, ring: a reason" in text
    assert "80 %" in text and "90 %" in text


def test_the_table_of_sums_has_the_ratio_last():
    rows = lines(comm.sums_table(canned.comm_job()))
    assert rows[2] == ["4", "MB", "0.900", "1.000", "5.000", "0.90", "5.0"]


def test_the_table_of_scaling_marks_more_ranks_than_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    def job(ranks, ms):
        times = {f"{way} {kind}": [ms] for way in ("ours", "ceiling") for kind in scaling.KINDS}
        return {"ranks": ranks, "tokens": {"weak": 100 * ranks, "strong": 100}, "times_ms": times}

    rows = scaling.summary({ranks: [job(ranks, 10.0)] for ranks in scaling.RANKS})
    shown = lines(scaling.table("gpt-0.81M", rows))
    assert shown[2][:2] == ["weak", "2"] and shown[2][-1] == "1.00"
    assert shown[3][:2] == ["weak", "4*"] and shown[3][-1] == "2.00"
    assert shown[5][:2] == ["strong", "2"] and shown[5][-1] == "0.50"


def test_scaling_leaves_out_what_has_fewer_rows_than_ranks():
    few = {"ranks": 4, "tokens": {"weak": 4}, "times_ms": {"ours weak": [1.0], "ceiling weak": [1.0]}}
    one = {
        "ranks": 1,
        "tokens": {"weak": 1, "strong": 1},
        "times_ms": {f"{way} {kind}": [1.0] for way in ("ours", "ceiling") for kind in scaling.KINDS},
    }
    rows = scaling.summary({1: [one], 4: [few]})
    assert [(row["kind"], row["ranks"]) for row in rows] == [("weak", 1), ("weak", 4), ("strong", 1)]


def test_the_table_of_memory_has_each_term_and_the_ratio_last():
    job = canned.memory_job()
    total = sum(memory.terms_of(job).values())
    row = lines(memory.table([job]))[1]
    assert row[:3] == ["gpt-0.81M", "2", "300.0"]
    assert row[-1] == f"{900e6 / total:.2f}"


def test_the_table_of_nanogpt_has_the_ratio_last_and_says_what_was_not_reached():
    runs = canned.nanogpt_runs()
    rows = lines(nanogpt.tables({"runs": runs, "absent": ""}))
    assert next(row for row in rows if row[:3] == ["loss", "of", "1.88"])[-1] == "0.55"
    runs["torch"][1]["points"][-1][2] = 1.885
    text = nanogpt.tables({"runs": runs, "absent": ""})
    assert "not reached" in text
    assert "loss of 1.8850, which all reached" in text
    alone = nanogpt.tables({"runs": {"ours": runs["ours"]}, "absent": "no PyTorch here"})
    assert "not measured: PyTorch: no PyTorch here" in alone


def saved(folder, name, found, stamp="20260101-000000"):
    path = folder / name / f"{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": {"cores": 2, "processor": "a processor"}, **found}))


def grid_rows():
    job = {"steps_ms": [10.0, 20.0, 30.0], "talk_ms": 4.0, "sent": 2e6, "held": 3e6, "bubble": 0.25}
    job["parameters"] = 1_000_000
    ways = [
        parallel.GridOption(),
        parallel.GridOption(tensor=2),
        parallel.GridOption(pipeline=2, schedule="gpipe"),
    ]
    return [parallel.summary(2, way, [job, job]) for way in ways]


def test_the_table_of_grids_has_formulas_beside_what_was_counted():
    rows = {tuple(line[:2]): line for line in lines(parallel.table(grid_rows()))}
    assert rows["data", "2"][3:6] == ["102,400", "1.00", "4"]
    # The sum of 4 MB of gradients by two ranks: each sends as much.
    assert rows["data", "2"][6:8] == ["2.0", "4.0"]
    # 8 micro-batches through 2 ranks: one in nine of the time.
    assert rows["pipeline", "2,"][-4:] == ["25", "%", "11", "%"]


def test_words_name_ways_and_back():
    for ways in (*parallel.WAYS.values(), *parallel.ON_HOSTS.values()):
        assert [parallel.of_word(way.word) for way in ways] == list(ways)


def test_the_targets_are_read_from_the_newest_files(tmp_path):
    models = {name: canned.step_model() for name in ("gpt-10.7M", "gpt-0.81M", "lstm-1.08M")}
    saved(tmp_path, "step", {"models": {}}, stamp="20250101-000000")
    saved(tmp_path, "step", {"models": models})
    (tmp_path / "step" / "z-not-a-report.json").write_text("{}")
    saved(tmp_path, "comm", {"jobs": [canned.comm_job(2), canned.comm_job(4)]})
    saved(tmp_path, "nanogpt", {"runs": canned.nanogpt_runs()})
    saved(tmp_path, "network", {"rates": {"1gbit": {"steps_ms": {"horovod": 130.0, "overlap": 100.0}}}})
    text = report.targets(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    found = {row[0]: row[2:] for row in rows[2:]}
    assert found["window allreduce / MPI `Allreduce`, 4-64 MB, np 4"] == ["5.00", "met"]
    assert found["GPT 10.7 M: np 2 / compute only"] == ["0.95", "missed"]
    assert found["GPT 10.7 M: np 2 / Keras in one process"] == ["2.00", "met"]
    assert found["GPT 0.81 M: np 2 / Keras in one process, also with XLA"] == ["1.60", "met"]
    assert found["GPT 0.81 M: np 2 with `--xla on` / Keras in one process"] == ["3.20", "met"]
    assert found["LSTM 1.08 M: np 2 / Horovod, defaults or best"] == ["4.00", "met"]
    assert found["GPT 10.7 M: np 2 / PyTorch DDP"] == ["1.50", "met"]
    assert found["bfloat16 / float32, GPT 10.7 M"] == ["2.50", "met"]
    assert found["nanoGPT recipe: time to 1.88 / PyTorch's"] == ["0.55", "met"]
    assert found["two hosts at 1 Gbit/s, GPT 10.7 M: np 2 / Horovod"] == ["1.30", "met"]
    assert found["LSTM: share of the GEMM peak"] == ["80 %", "missed"]
    assert "20260101-000000.json, 2 cores of a processor" in text
    assert text.count("not measured") == 8  # those of strategies: see test_strategies.py


def test_targets_without_files_or_peers_are_not_measured(tmp_path):
    assert "met" not in report.targets(tmp_path).replace("GEMM", "")
    model = canned.step_model()
    model["rows"] = [row for row in model["rows"] if row["way"] == "ours"]
    saved(tmp_path, "step", {"models": {"gpt-10.7M": model}})
    saved(tmp_path, "nanogpt", {"runs": {"ours": canned.nanogpt_runs()["ours"]}})
    rows = [line for line in report.targets(tmp_path).splitlines() if "PyTorch" in line]
    assert rows and all("not measured" in row for row in rows)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: parallel.picture({"one node": grid_rows()}, path),
        lambda path: step.picture({"gpt-0.81M": canned.step_model()}, path),
        lambda path: comm.picture([canned.comm_job(2), canned.comm_job(4)], path),
        lambda path: memory.picture([canned.memory_job()], path),
        lambda path: nanogpt.picture({"runs": canned.nanogpt_runs()}, path),
        lambda path: exact.picture({"lstm / plain": {1: "0" * 64, 2: "1" * 64}}, path),
        lambda path: exact_cost.picture(
            [
                {
                    "ranks": 2,
                    "steps": {"GPT": {"tree": 1.1, "plain": 1.0}},
                    "sums": [{"parameters": 1000, "tree": 2.0, "plain": 1.0}],
                }
            ],
            path,
        ),
        lambda path: scaling.picture(
            {"gpt": [{"kind": "weak", "ranks": n, "efficiency": 0.9, "of_ceiling": 0.9} for n in (1, 2)]},
            path,
        ),
    ],
    ids=["parallel", "step", "comm", "memory", "nanogpt", "exact", "exact-cost", "scaling"],
)
def test_every_benchmark_has_a_picture(draw, tmp_path):
    path = draw(tmp_path / "folder" / "picture.png")
    assert path.read_bytes()[:4] == PNG


def test_a_report_is_saved_with_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    found = json.loads(runner.save("step", {"models": {}}).read_text())
    assert found["machine"]["cores"] and found["models"] == {}
