"""Tables: what they expand to, how they are run, and what is said of the results."""

import csv
import dataclasses
import io
import json
import math
import os
import subprocess
import sys

import pytest

from fedasr.cli.sweep import clusters, definitions, execution
from fedasr.cli.sweep.results import write_results
from fedasr.cli.sweep.runs import Place, read_outcome, read_outcomes
from fedasr.errors import UserError
from fedasr.recipes import tables
from fedasr.recipes.tables import Outcome, Row, Table

# Understands the flags of `fedasr train`, trains nothing. The fields "do" and "base" say what
# it does and what comes out.
FAKE = """
import json, math, os, pathlib, sys
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags.pop("workdir"))
config, summary = workdir / "config.json", workdir / "summary.json"
if config.exists() and json.loads(config.read_text()) != flags:
    sys.exit("error: belongs to another configuration")
config.write_text(json.dumps(flags))
with open(workdir / "launches", "a") as file:
    print(sorted(os.sched_getaffinity(0)), os.environ["JAX_COMPILATION_CACHE_DIR"], file=file)
with open(workdir.parent / "order", "a") as file:
    print(workdir.name, file=file)
do = flags.get("config.do", "")
if do == "crash" or do == "crash once" and len(open(workdir / "launches").readlines()) == 1:
    sys.exit("Traceback\\nerror: out of | luck\\n")
rate = float(flags.get("config.base", 10)) + int(flags["config.seed"])
rate += abs(math.log10(float(flags.get("config.server.learning_rate", 0.01))) + 2)
result = {"status": "completed", "wer": {"dev": rate, "test": 2 * rate}}
result["privacy"] = {"enabled": True, "extrapolations": [{"epsilon": 7.25}, {"epsilon": 1.0}]}
if do == "diverge":
    result |= {"status": "diverged", "wer": {"dev": None, "test": None}}
summary.write_text(json.dumps(result))
sys.exit(do == "diverge")
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return Place(tmp_path / "out", (sys.executable, str(tmp_path / "fake.py")))


TABLE = Table(
    name="optimizers",
    title="Server optimisers (arXiv)",
    config="mini.py",
    rows=(
        Row("LAMB", {"base": 5}, {"test": 12.5}),
        Row("SGD", {"base": 8}, {"test": 30.0}, grid={"server.learning_rate": (1.0, 0.1)}),
        Row("seeded", {"base": 2, "server.learning_rate": 0.01}, start="seed", grid={}),
    ),
    grid={"server.learning_rate": (0.1, 0.01, 0.001)},
    seeds=(0, 1, 2),
    starts=(Row("seed", {"base": 90}),),
    expected="LAMB before SGD",
    better=(("LAMB", "SGD"), ("SGD", "seeded")),
)


def replace(table=TABLE, **fields):
    return dataclasses.replace(table, **fields)


def simple(*rows, **fields):
    return Table("simple", "Simple", "mini.py", rows, **fields)


def done(dev, test=None, status="completed", **fields):
    return Outcome(status, {"wer": {"dev": dev, "test": dev if test is None else test}, **fields})


# Expansion ---------------------------------------------------------------------------------------


def test_expand_gives_starts_then_the_grid_at_the_first_seed():
    names = [run.name for run in tables.expand(TABLE)]
    assert names == [
        "seed__seed-0",
        "seed__seed-1",
        "seed__seed-2",
        "LAMB__learning_rate-0.1__seed-0",
        "LAMB__learning_rate-0.01__seed-0",
        "LAMB__learning_rate-0.001__seed-0",
        "SGD__learning_rate-1.0__seed-0",
        "SGD__learning_rate-0.1__seed-0",
        "seeded__seed-0",
        "seeded__seed-1",
        "seeded__seed-2",
    ]
    assert tables.size(TABLE) == len(names) + 4
    lamb = tables.expand(TABLE)[3]
    assert lamb.overrides == {"base": 5, "server.learning_rate": 0.1, "seed": 0}
    assert tables.expand(TABLE)[-1].start == "seed__seed-2"


def test_fields_with_the_same_last_name_are_told_apart():
    table = simple(
        Row("a b/c", {}), grid={"client.lr": (1,), "server.lr": (2,), "x.sigma": (1e-5,)}
    )
    (run,) = tables.expand(table)
    assert run.name == "a_b_c__client.lr-1__server.lr-2__sigma-1e-05__seed-0"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "a-b"}, "letters"),
        ({"rows": ()}, "needs a row"),
        ({"seeds": (1, 1)}, "twice"),
        ({"rows": (Row("a", {}, start="none"),), "better": ()}, "cannot start"),
        ({"rows": (Row("a", {"server.learning_rate": 1}),), "better": ()}, "the sweep sets"),
        ({"rows": (Row("a", {"seed": 1}),), "better": ()}, "the sweep sets"),
        ({"rows": (Row("a", {}, grid={"x": ()}),), "better": ()}, "no value"),
        ({"rows": (Row("A", {}), Row("a", {})), "better": ()}, "differ more"),
        ({"better": (("LAMB", "Adam"),)}, "'Adam'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(fields, words):
    tables.check(TABLE)
    with pytest.raises(UserError, match=words):
        tables.check(replace(**fields))


def test_choice_is_the_first_of_the_best_at_the_first_seed():
    row = TABLE.rows[0]
    names = [run.name for run in tables.expand(TABLE) if run.row == "LAMB"]
    rates = dict(zip(names, [done(5.0), done(4.0), done(4.0)], strict=True))
    assert tables.choose(TABLE, row, rates) == {"server.learning_rate": 0.01}
    rates[names[1]] = done(None, status="diverged")
    assert tables.choose(TABLE, row, rates) == {"server.learning_rate": 0.001}
    rates[names[2]] = Outcome("failed")
    assert tables.choose(TABLE, row, rates) == {"server.learning_rate": 0.1}
    assert tables.choose(TABLE, row, {}) is None
    assert tables.choose(simple(row), row, {}) == {}


def test_second_phase_waits_for_the_whole_first():
    outcomes = {run.name: done(50.0) for run in tables.expand(TABLE) if run.row != "LAMB"}
    waiting = [run.name for run in tables.pending(TABLE, outcomes)]
    assert waiting[3:] == [f"SGD__learning_rate-1.0__seed-{seed}" for seed in (1, 2)]
    assert tables.undecided(TABLE, outcomes) == ["LAMB"]
    outcomes |= {name: Outcome("failed") for name in waiting[:2]} | {waiting[2]: done(9.0)}
    later = [run.name for run in tables.pending(TABLE, outcomes)]
    assert later[:2] == [f"LAMB__learning_rate-0.001__seed-{seed}" for seed in (1, 2)]
    assert tables.undecided(TABLE, outcomes) == []


def test_ready_runs_have_what_they_start_from():
    assert "seeded" not in {run.row for run in tables.ready(TABLE, {})}
    outcomes = {"seed__seed-1": done(90.0), "seed__seed-0": Outcome("failed")}
    ready = [run.name for run in tables.ready(TABLE, outcomes) if run.row == "seeded"]
    assert ready == ["seeded__seed-1"]


@pytest.mark.parametrize("text", ["a", "a=1;=2", "a=1;a=2"])
def test_mistaken_fields_are_refused(text):
    with pytest.raises(UserError, match="--set"):
        definitions.parse_fields(text, "--set")


def test_ad_hoc_grid_has_a_row_for_each_point():
    table = definitions.ad_hoc("a/my-file.py:x=1", "server.lr=0.1, 0.2;sigma=1e-5", (3,))
    definitions.check(table, {"data.dir": "d"})
    assert (table.name, table.config) == ("my_file", "a/my-file.py:x=1")
    assert [row.name for row in table.rows] == ["lr=0.1, sigma=1e-5", "lr=0.2, sigma=1e-5"]
    assert tables.expand(table)[1].overrides == {"server.lr": "0.2", "sigma": "1e-5", "seed": 3}
    assert definitions.ad_hoc("a.py", "", (0,)).rows == (Row("a", {}),)


def test_fixed_fields_win_except_over_the_grid(place):
    fixed = dataclasses.replace(place, fixed={"base": "1"})
    flags = fixed.flags(TABLE, tables.expand(TABLE)[-1])
    out = place.out / "optimizers"
    assert flags == [
        "--config=mini.py",
        f"--workdir={out / 'seeded__seed-2'}",
        "--config.base=1",
        "--config.server.learning_rate=0.01",
        "--config.seed=2",
        f"--config.init_from={out / 'seed__seed-2'}",
    ]
    for field in ("seed", "server.learning_rate"):
        with pytest.raises(UserError, match="--set"):
            definitions.check(TABLE, {field: "1"})


def test_arguments_go_to_the_configuration_file(place):
    table = replace(simple(Row("a", {}, arguments="x=2"), Row("b", {})), config="c.py:y=1")
    configs = [place.flags(table, run)[0] for run in tables.expand(table)]
    assert configs == ["--config=c.py:y=1,x=2", "--config=c.py:y=1"]


def test_registry_reads_a_file(tmp_path):
    file = tmp_path / "tables.py"
    file.write_text("TABLES = {'t': 1}")
    assert definitions.registry(str(file)) == {"t": 1}
    for text in ("", "TABLES = ("):
        file.write_text(text)
        with pytest.raises(UserError, match="TABLES"):
            definitions.registry(str(file))
    assert isinstance(definitions.registry(), dict)


def test_a_saved_table_is_read_back(tmp_path):
    table = replace(better=(("LAMB", "SGD"),), log_x=True)
    definitions.save_table(table, tmp_path)
    assert definitions.load_table(tmp_path / "optimizers" / "table.json") == table
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(UserError, match="no table"):
        definitions.load_table(tmp_path / "table.json")


# Running -----------------------------------------------------------------------------------------


def order(place, table):
    file = place.out / table.name / "order"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def test_a_whole_table(place):
    seen = []
    seconds = execution.execute(
        [TABLE], place, report=lambda table, run, outcome, _: seen.append((run.name, outcome))
    )
    assert seconds["optimizers"] > 0
    ran = order(place, TABLE)
    assert ran == [name for name, _ in seen]
    assert ran[:3] == [f"seed__seed-{seed}" for seed in (0, 1, 2)]
    best = ["LAMB__learning_rate-0.01", "SGD__learning_rate-0.1"]
    assert ran[-4:] == [f"{name}__seed-{seed}" for name in best for seed in (1, 2)]
    assert len(ran) == tables.size(TABLE)
    log = (place.out / "optimizers" / "seeded__seed-1" / "sweep.log").read_text()
    assert log.startswith("$ ") and f"--config.init_from={place.out}/optimizers/seed__seed-1" in log

    execution.execute([TABLE], place)
    assert order(place, TABLE) == []

    results = write_results(TABLE, place.out)
    assert results["runs"] == {"completed": 15, "failed": 0, "missing": 0}
    lamb = results["rows"][0]
    assert lamb["point"] == {"server.learning_rate": 0.01}
    assert lamb["wer"]["test"] == {"mean": 12.0, "std": 2.0, "values": [10.0, 12.0, 14.0]}
    assert lamb["difference"] == {"test": -0.5}
    assert lamb["epsilon"] == 7.25
    assert [item["verdict"] for item in results["verdicts"]] == ["agrees", "disagrees"]
    saved = json.loads((place.out / "optimizers.json").read_text())
    assert saved["rows"] == results["rows"]
    assert (place.out / "optimizers.png").read_bytes().startswith(b"\x89PNG")


def test_failures_are_recorded_and_the_sweep_goes_on(place):
    table = simple(
        Row("bad", {"do": "crash"}),
        Row("lost", {"do": "diverge"}),
        Row("late", {"do": "crash once"}),
        Row("good", {}),
    )
    execution.execute([table], place)
    assert order(place, table) == [f"{name}__seed-0" for name in ("bad", "lost", "late", "good")]
    results = write_results(table, place.out)
    assert results["runs"] == {"completed": 1, "failed": 3, "missing": 0}
    notes = [row["notes"] for row in results["rows"]]
    failed = ["seed 0 failed: out of | luck"]
    assert notes == [failed, ["seed 0 diverged"], failed, []]
    assert "out of \\| luck" in (place.out / "simple.md").read_text()

    # What failed is tried again, what diverged would only diverge again.
    execution.execute([table], place)
    assert order(place, table) == ["bad__seed-0", "late__seed-0"]
    assert write_results(table, place.out)["runs"]["completed"] == 2


def test_rows_whose_start_failed_are_not_run(place):
    table = simple(Row("a", {}, start="s"), starts=(Row("s", {"do": "crash"}),))
    execution.execute([table], place)
    assert order(place, table) == ["s__seed-0"]
    results = write_results(table, place.out)
    assert results["runs"] == {"completed": 0, "failed": 1, "missing": 1}
    assert results["rows"][0]["notes"] == ["seed 0 missing: its start s__seed-0 failed"]


def test_an_unfinished_run_is_resumed(place):
    table = simple(Row("a", {}))
    folder = place.out / "simple" / "a__seed-0"
    execution.execute([table], place)
    (folder / "summary.json").write_text('{"status": "interrupted"}')
    (folder / "sweep.json").unlink()
    assert read_outcome(folder).status == "unfinished"
    order(place, table)
    execution.execute([table], place)
    assert order(place, table) == ["a__seed-0"]
    assert read_outcome(folder).status == "completed"


def test_results_of_another_configuration_are_not_taken_for_these(place):
    table = simple(Row("a", {}))
    execution.execute([table], place)
    other = dataclasses.replace(place, fixed={"base": "3"})
    for _ in range(2):
        execution.execute([table], other)
        (row,) = write_results(table, place.out)["rows"]
        assert row["notes"] == ["seed 0 failed: belongs to another configuration"]
        assert row["wer"] == {}
    execution.execute([table], place)
    assert write_results(table, place.out)["runs"]["completed"] == 1


def test_an_edited_configuration_file_is_seen(place, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("one")
    table = replace(simple(Row("a", {})), config=f"{config}:argument")
    execution.execute([table], place)
    execution.execute([table], place)
    config.write_text("two")
    execution.execute([table], place)
    assert order(place, table) == ["a__seed-0", "a__seed-0"]


def test_a_launcher_that_writes_nothing_has_failed(place):
    table = simple(Row("a", {}))
    execution.execute([table], dataclasses.replace(place, launcher=(sys.executable, "-c", "")))
    outcome = read_outcome(place.out / "simple" / "a__seed-0")
    assert (outcome.status, outcome.message) == ("failed", "exit status 0 without a result")
    with pytest.raises(UserError, match="--launcher=nowhere"):
        execution.execute([table], dataclasses.replace(place, launcher=("nowhere",)))


def test_the_simulated_clock_of_a_run_is_read(place):
    table = simple(Row("a", {}), reach=(50.0,))
    folder = place.out / "simple" / "a__seed-0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": "completed"}))
    records = [
        {"round": 0, "eval": {"dev": {"wer": 90.0}}},
        {"round": 1, "participation": {"clock": 3.5}, "eval": {"dev": {"wer": 40.0}}},
        {"round": 2, "participation": {"clock": 4.5}},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in records))
    outcome = read_outcomes(table, place.out)["a__seed-0"]
    assert outcome.clock == ((3.5, {"dev": 40.0}),)
    assert outcome.seconds_until("dev", 50.0) == 3.5
    assert outcome.seconds_until("dev", 30.0) == math.inf == outcome.seconds_until("test", 50.0)
    assert read_outcomes(replace(table, reach=()), place.out)["a__seed-0"].clock == ()


def test_runs_made_elsewhere_count(place):
    folder = place.out / "simple" / "a__seed-0"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text('{"error": "here it failed"}')
    assert read_outcome(folder).message == "here it failed"
    later = (folder / "sweep.json").stat().st_mtime_ns + 1_000_000
    (folder / "summary.json").write_text(json.dumps(done(3.0).summary | {"status": "completed"}))
    os.utime(folder / "summary.json", ns=(later, later))
    assert read_outcome(folder).wer("dev") == 3.0


@pytest.mark.parametrize(
    ("count", "jobs", "shares"),
    [(4, 2, [[0, 1], [2, 3]]), (5, 2, [[0, 1], [2, 3]]), (2, 3, [[0], [1], [0]])],
)
def test_shares_of_cores(count, jobs, shares):
    assert [execution.share_of_cores(range(count), slot, jobs) for slot in range(jobs)] == shares


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_each_of_several_jobs_sees_its_share(place, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = os.sched_getaffinity(0)
    jobs = len(before)
    table = simple(*(Row(f"row {n}", {}) for n in range(2 * jobs)))
    execution.execute([table], place, jobs=jobs)
    assert os.sched_getaffinity(0) == before
    lines = {path.read_text() for path in (place.out / "simple").glob("*/launches")}
    cache = place.out / ".compile-cache"
    assert lines <= {f"[{core}] {cache}\n" for core in before}
    assert len(order(place, table)) == 2 * jobs


# Results -----------------------------------------------------------------------------------------


def result(name, *values):
    table = simple(Row(name, {}), seeds=tuple(range(max(1, len(values)))))
    runs = tables.expand(table)
    outcomes = {run.name: done(value) for run, value in zip(runs, values, strict=False)}
    return tables.collect(table, outcomes)["rows"][0]


@pytest.mark.parametrize(
    ("better", "worse", "words"),
    [
        ((1.0, 1.2), (5.0, 5.2), "agrees"),
        ((5.0, 5.2), (1.0, 1.2), "disagrees"),
        ((1.0, 3.0), (2.0, 4.0), "not separable"),
        ((1.0, 1.0), (1.0, 1.0), "not separable"),
        ((1.0, 1.0), (1.1, 1.1), "agrees"),
        ((1.0,), (5.0, 5.2), "one seed, not judged"),
        ((), (5.0, 5.2), "no result"),
        ((1.0, 1.2), (None, None), "no result"),
    ],
)
def test_verdicts(better, worse, words):
    assert tables.verdict(result("a", *better), result("b", *worse), "test")["verdict"] == words


def test_standard_error_is_welchs():
    item = tables.verdict(result("a", 1.0, 3.0), result("b", 5.0, 6.0, 10.0), "test")
    assert item["difference"] == 5.0
    assert item["standard_error"] == pytest.approx((2 / 2 + 7 / 3) ** 0.5)


def outcomes_of(rates):
    return {name: done(rate, 2 * rate) for name, rate in rates.items()}


def test_markdown():
    outcomes = outcomes_of({"LAMB__learning_rate-0.1__seed-0": 6.0, "seeded__seed-0": 3.0})
    outcomes["seeded__seed-1"] = done(4.0, privacy={"enabled": True, "extrapolations": [{}]})
    outcomes["seeded__seed-0"].summary["privacy"] = {
        "enabled": True,
        "extrapolations": [{"epsilon": math.inf}],
    }
    outcomes["LAMB__learning_rate-0.01__seed-0"] = Outcome("diverged")
    outcomes["LAMB__learning_rate-0.001__seed-0"] = Outcome("failed", message="no memory")
    outcomes["seed__seed-1"] = Outcome("unfinished")
    table = replace(rows=(TABLE.rows[0], TABLE.rows[2]), better=(("LAMB", "seeded"),))
    text = tables.to_markdown(table, tables.collect(table, outcomes), "optimizers.png")
    assert text == (
        "# Server optimisers (arXiv)\n"
        "\n"
        "Word error rates in percent, mean ± sample standard deviation over 3 seeds. "
        "Runs: 3 completed, 2 failed, 6 missing.\n"
        "\n"
        "|  | chosen | seeds | dev WER | test WER | epsilon | published test | test difference "
        "| notes |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        "| seed |  | 0 of 3 | - | - |  |  |  "
        "| seed 0 missing; seed 1 unfinished; seed 2 missing |\n"
        "| LAMB | learning_rate=0.1 | 1 of 3 | 6.0 | 12.0 |  | 12.5 | -0.5 "
        "| learning_rate=0.01, seed 0 diverged; learning_rate=0.001, seed 0 failed: no memory; "
        "learning_rate=0.1, seed 1 missing; learning_rate=0.1, seed 2 missing |\n"
        "| seeded |  | 2 of 3 | 3.5 ± 0.7 | 5.0 ± 1.4 | infinite |  |  | seed 2 missing |\n"
        "\n"
        "Published ordering: LAMB before SGD\n"
        "\n"
        "Found on test (separable: the means differ by more than two standard errors of the "
        "difference):\n"
        "\n"
        "* LAMB better than seeded: one seed, not judged (difference -7.0)\n"
        "\n"
        "![Server optimisers (arXiv)](optimizers.png)\n"
    )


def test_users_and_the_simulated_clock():
    """Over two seeds, of which one has not come to the lower of two rates."""
    table = simple(Row("a", {}), Row("b", {}), seeds=(0, 1), users=True, reach=(50.0, 20.0))
    outcomes = {}
    for seed, last in ((0, 20.0), (1, 30.0)):
        served = {"mean": 10.0 + seed, "worst_decile": 40.0, "intervals": {"mean": [5.0, 20.0]}}
        clock = ((60.0, {"test": 1.0}), (120.0, {"dev": 50.0}), (240.0, {"dev": last}))
        run = done(last, served={"test": served}, simulated_seconds=240.0 + 120 * seed)
        outcomes[f"a__seed-{seed}"] = dataclasses.replace(run, clock=clock)
        outcomes[f"b__seed-{seed}"] = done(last, served={"dev": {"mean": 9.0}})
    (a, b), text, as_csv = _rows_and_texts(table, outcomes)
    assert a["simulated"] == 300.0 and a["until"] == {"50": 120.0, "20": math.inf}
    assert a["users"]["test"] == {"mean": 10.5, "low": 5.0, "high": 20.0, "worst_tenth": 40.0}
    assert b["simulated"] is None and b["users"]["dev"]["low"] is None
    lines = [line for line in text.splitlines() if line.startswith("|")]
    names, of_a, of_b = (
        [x.strip() for x in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])
    )
    a, b = dict(zip(names, of_a, strict=True)), dict(zip(names, of_b, strict=True))
    assert (a["test users"], a["test worst tenth"], a["simulated (min)"]) == (
        "10.5 [5.0, 20.0]",
        "40.0",
        "5.0",
    )
    assert (a["min to 50% dev"], a["min to 20% dev"]) == ("2.0", "not reached")
    assert (b["dev users"], b["simulated (min)"]) == ("9.0", "") and "dev worst tenth" not in b
    a, b = csv.DictReader(io.StringIO(as_csv))
    assert (a["test_users_mean"], a["test_users_worst_tenth"]) == ("10.5", "40.0")
    assert (a["simulated_seconds"], a["seconds_to_50"], a["seconds_to_20"]) == (
        "300.0",
        "120.0",
        "not reached",
    )
    assert (b["dev_users_mean"], b["simulated_seconds"], b["test_users_low"]) == ("9.0", "", "")


def _rows_and_texts(table, outcomes):
    results = tables.collect(table, outcomes)
    return results["rows"], tables.to_markdown(table, results), tables.to_csv(table, results)


def test_csv():
    outcomes = outcomes_of({"LAMB__learning_rate-0.1__seed-0": 6.0})
    text = tables.to_csv(TABLE, tables.collect(TABLE, outcomes))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["row"] for line in lines] == ["seed", "LAMB", "SGD", "seeded"]
    lamb, sgd = lines[1:3]
    assert (lamb["server.learning_rate"], lamb["dev_mean"], lamb["seeds"]) == ("0.1", "6.0", "0")
    assert (lamb["test_published"], lamb["test_difference"]) == ("12.5", "-0.5")
    assert (sgd["test_mean"], sgd["test_published"]) == ("", "30.0")
    assert "wait for the grid" in sgd["notes"]


def test_plot_of_lines_has_a_place_for_zero(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    rows = [
        Row(f"{series} {x}", {}, {"test": 20.0 + x}, series=series, x=x)
        for series in ("global", "dim")
        for x in (0, 1, 10)
    ]
    rows.append(Row("central", {}, {"test": 17.0}))
    table = simple(*rows, seeds=(0, 1), x_label="sigma, $10^{-6}$", log_x=True)
    rates = {run.name: 5.0 + run.seed for run in tables.expand(table)}
    del rates["dim_10__seed-0"], rates["dim_10__seed-1"]
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    results = tables.collect(table, outcomes_of(rates))
    path = tables.write_plot(table, results, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "10"]
    labels = axes.get_legend_handles_labels()[1]
    lines = ("central", "dim", "global")
    assert sorted(labels) == sorted([*lines, *(f"{name} published" for name in lines)])
    assert "word error rate" in axes.get_ylabel()


def test_plot_of_nothing(tmp_path):
    for table in (TABLE, simple(Row("a", {}, x=1.0), log_x=True)):
        path = tables.write_plot(table, tables.collect(table, {}), tmp_path / "a.png")
        assert path.read_bytes().startswith(b"\x89PNG")


# Clusters ----------------------------------------------------------------------------------------


def test_slurm_scripts_run_their_line(place):
    again = "python -m experiments.sweep --action=slurm"
    (place.out / "slurm").mkdir(parents=True)
    (place.out / "slurm" / "phase2.sh").touch()
    scripts = clusters.write_slurm([TABLE], place, "A100:1", 4, again)
    assert [script.name for script in scripts] == ["starts.sh", "phase1.sh"]
    assert not (place.out / "slurm" / "phase2.sh").exists()
    text = scripts[1].read_text()
    assert "#SBATCH --array=1-8%4\n" in text and "#SBATCH --gpus=a100:1\n" in text
    assert again in text
    commands = (place.out / "slurm" / "phase1.txt").read_text().splitlines()
    assert len(commands) == 8
    (place.out / "optimizers" / "SGD__learning_rate-1.0__seed-0").mkdir(parents=True)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "4"}
    subprocess.run(["bash", str(scripts[1])], env=environment, check=True, capture_output=True)
    outcomes = read_outcomes(TABLE, place.out)
    assert [name for name, one in outcomes.items() if one.status == "completed"] == [
        "SGD__learning_rate-1.0__seed-0"
    ]
    assert len(clusters.plan(TABLE, place)["phase1"]) == 7


@pytest.mark.parametrize(("accelerators", "extra"), [("A100:1", "cuda"), ("tpu-v5e-8", "tpu")])
def test_skypilot_task_is_valid(place, accelerators, extra):
    yaml = pytest.importorskip("yaml", reason="PyYAML is needed to read the task")
    (path,) = clusters.write_skypilot([TABLE], place, accelerators, "again")
    task = yaml.safe_load(path.read_text())
    assert task.keys() == {"name", "resources", "workdir", "setup", "run"}
    assert task["resources"] == {"accelerators": accelerators}
    assert f"[quickstart,{extra}]" in task["setup"]
    plan = clusters.plan(TABLE, place)
    for command in plan["starts"] + plan["phase1"]:
        assert f"{command} || status=1\n" in task["run"]
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
