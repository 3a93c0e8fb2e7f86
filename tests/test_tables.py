"""The tables of docs/results.md: what is planned, run, kept and written. `dsnet` is played by a small program here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsnet_jax.cli import _parser
from dsnet_jax.config import from_json, to_json
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.submissions import FORMATS

REPOSITORY = Path(__file__).parents[1]
CONFIG = """
from dsnet_jax.config import default_config

def get_config(name="base"):
    config = default_config()
    config.init_from = "weights/resnet50" if name in ("base", "tuned") else ""
    config.data.name = "shapes"
    config.training.epochs = 40
    config.model.width = {"base": 8, "aspp": 16, "regular": 24, "cgds": 32, "tuned": 40}[name]
    return config
"""
ROWS = {
    "cpu": [
        {"system": "ASPP", "config": "camvid_comparison.py:aspp"},
        {"system": "the grid", "config": "camvid_comparison.py:regular", "first": True},
        {"system": "DSNet", "config": "camvid_comparison.py:cgds", "first": True, "paper": 79.0},
    ],
    "paper": [
        {
            "title": "Table 2",
            "where": "val",
            "notes": ["a doubt"],
            "rows": [
                {"system": "base", "paper": 80.98, "config": "big.py", "protocol": "ss"},
                {"system": "base, flip", "paper": 81.63, "config": "big.py", "protocol": "flip"},
                {"system": "tuned", "config": "big.py:tuned", "after": "big.py", "protocol": "flip", "split": "test"},
                {"system": "another", "paper": 62.2},
            ],
        }
    ],
}
PAGE = """# Results

by hand, above
<!-- scripts/tables.py writes from here: cpu -->
<!-- to here: cpu -->
by hand, between
<!-- scripts/tables.py writes from here: paper -->
<!-- to here: paper -->
by hand, below
"""


class Stage:
    """A folder in which scripts/tables.py works, and the orders of the program that plays `dsnet`."""

    def __init__(self, folder: Path, tables, runs):
        self.folder, self.tables, self.runs = folder, tables, runs
        self.orders = {"configs": str(folder / "expected"), "broken": [], "seconds": 0, "miou": {}}
        (folder / "docs").mkdir()
        (folder / "expected").mkdir()
        self.page = folder / "docs" / "results.md"
        self.page.write_text(PAGE)

    def main(self, *flags: str, fields: tuple[str, ...] = ()) -> int:
        for scale in ("cpu", "paper"):
            for run in self.runs.planned(scale, 3):
                (self.folder / "expected" / f"{run.name}.json").write_text(to_json(run.load(fields)))
        (self.folder / "orders.json").write_text(json.dumps(self.orders))
        return self.tables.main([f"--runs={self.folder / 'runs'}", f"--docs={self.folder / 'docs'}", *flags, *fields])

    def calls(self) -> list[str]:
        """Of `dsnet` since this was asked last."""
        file = self.folder / "calls.txt"
        calls = [line.strip() for line in file.read_text().splitlines()] if file.exists() else []
        file.write_text("")
        return calls

    def facts(self, name: str) -> dict:
        return json.loads((self.folder / "docs" / "results" / f"{name}.json").read_text())


@pytest.fixture
def scripts(monkeypatch):
    """scripts/tables.py and scripts/tables_runs.py, as they are."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import tables
    import tables_page
    import tables_runs

    yield tables, tables_runs, tables_page
    for name in "tables", "tables_page", "tables_runs":
        sys.modules.pop(name)


@pytest.fixture
def stage(scripts, monkeypatch, tmp_path):
    tables, runs, page = scripts
    (tmp_path / "configs").mkdir()
    for name in "camvid_comparison.py", "big.py":
        (tmp_path / "configs" / name).write_text(CONFIG)
    for module in runs, page:
        monkeypatch.setattr(module, "ROWS", ROWS)
    for module in runs, tables:
        monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(tables, "DSNET", [sys.executable, str(REPOSITORY / "tests" / "played_dsnet.py")])
    monkeypatch.setattr(runs, "hardware", lambda: "2 cores of a test")
    monkeypatch.setenv("ORDERS", str(tmp_path / "orders.json"))
    return Stage(tmp_path, tables, runs)


def row_of(page: Path, system: str) -> list[str]:
    """The cells of the first line of a table that begins with `system`."""
    line = next(line for line in page.read_text().splitlines() if line.startswith(f"| {system} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_row_of_the_tables_has_commands_that_are_read_and_a_config_that_loads(scripts):
    runs = scripts[1]
    for scale in ("cpu", "paper"):
        earlier = {""}
        for run in runs.planned(scale, 1):
            config = run.load()
            assert config.seed == 0, run
            without = scale == "cpu" or run.config.startswith("voc2012_comparison") or run.config.endswith(":baseline")
            assert config.model.deep_supervision != without, run
            assert run.after in earlier, run
            earlier.add(run.config)
            for command in run.commands("runs", run.flags("runs")):
                options, fields = _parser().parse_known_args(command)
                assert fields == (run.flags("runs") if options.command == "train" else []), command
            assert not run.submits or FORMATS[config.data.name].archive == Path(options.submission).suffix
    assert len({runs.run_of(row, 0).name for row in runs.ROWS["cpu"]}) == len(runs.ROWS["cpu"])


def test_two_seeds_of_the_first_rows_come_before_one_of_the_others(scripts):
    names = [run.name.removeprefix("camvid_comparison-") for run in scripts[1].planned("cpu", 2)]
    assert names[:6] == [f"{name}-seed{seed}" for seed in (0, 1) for name in ("aspp", "regular", "cgds")]
    others = names[6:]
    seeds = [name[-1] for name in others]
    assert seeds == ["0"] * (len(others) // 2) + ["1"] * (len(others) // 2) and len(set(names)) == len(names)


def test_the_papers_means_are_those_of_their_classes(scripts):
    """Of 21 classes 20 are printed: what is left of the mean has to be a plausible background."""
    table = next(table for table in scripts[1].ROWS["paper"] if "classes" in table)
    for row in table["rows"]:
        assert len(row["classes"]) == len(table["classes"]) == 20
        assert 91 < 21 * row["paper"] - sum(row["classes"]) < 97.5, row["system"]


def test_what_is_missing_is_run_and_kept_and_then_skipped(stage, capsys):
    stage.orders["miou"] = {"camvid_comparison-cgds-seed0": 0.62, "camvid_comparison-cgds-seed1": 0.58}
    assert stage.main("--scale=cpu") == 0
    names = [f"camvid_comparison-{name}-seed{seed}" for seed in (0, 1) for name in ("regular", "cgds")]
    names += [f"camvid_comparison-aspp-seed{seed}" for seed in (0, 1)]
    assert stage.calls() == [call for name in names for call in (f"train {name}", f"evaluate {name} ss")]
    facts = stage.facts("camvid_comparison-cgds-seed1")
    assert (facts["epochs"], facts["steps"], facts["seed"], facts["hardware"]) == (40, 10, 1, "2 cores of a test")
    assert facts["minutes"] == pytest.approx(1) and facts["version"].startswith("0.")
    assert facts["offsets"] == {"mean": 1.0, "outside": 0.25, "largest": 19.0}
    assert facts["scores"]["ss"]["iou"] == {"sky": 0.58, "pole": None}
    assert facts["experiment"]["model"]["width"] == 32
    log = stage.folder / "docs" / "results" / "camvid_comparison-cgds-seed1.jsonl"
    assert len(log.read_text().splitlines()) == 11
    assert "6 of 6 runs are finished, 0 failed" in capsys.readouterr().out

    page = stage.page.read_text()
    config, runs, miou, gain, edges, _, mean, largest, outside, minutes, paper = row_of(stage.page, "DSNet")[1:]
    assert (config, runs, miou, gain) == ("`cgds`", "2", "60.00 (58.00 to 62.00)", "+10.00 (+12.00, +8.00)")
    assert edges == "40.00 (40.00 to 40.00)"
    assert (mean, largest, outside, minutes, paper) == ("1.00", "19.0", "25.0", "1.0", "79.0")
    assert row_of(stage.page, "the grid")[3:5] == ["50.00 (50.00 to 50.00)", "–"]
    assert "| DSNet | 60.0 | – |" in page  # Classes; pole is nowhere.
    assert "[facts](results/camvid_comparison-cgds-seed1.json)" in page
    by_hand = [line for line in page.splitlines() if line.startswith("by hand")]
    assert by_hand == ["by hand, above", "by hand, between", "by hand, below"]

    shutil.rmtree(stage.folder / "runs")  # Another machine: the facts are enough.
    assert stage.main("--scale=cpu") == 0 and stage.main() == 0
    assert stage.calls() == [] and stage.page.read_text() == page


def test_a_run_that_fails_is_told_and_the_others_go_on(stage, capsys):
    stage.orders["broken"] = ["camvid_comparison-regular-seed0"]
    assert stage.main("--scale=cpu", "--seeds=1") == 1
    told = capsys.readouterr()
    assert "dsnet train ended with exit code 1: dsnet: the data set is not there" in told.err
    assert "2 of 3 runs are finished, 1 failed\nleft, in this order: camvid_comparison-regular-seed0;" in told.out
    assert row_of(stage.page, "the grid")[2:4] == ["0", "not run"] and row_of(stage.page, "DSNet")[3:5] == [
        "50.00",
        "–",
    ]
    stage.orders["broken"] = []
    stage.calls()
    assert stage.main("--scale=cpu", "--seeds=1") == 0
    assert stage.calls() == ["train camvid_comparison-regular-seed0", "evaluate camvid_comparison-regular-seed0 ss"]


def test_the_end_of_the_minutes_stops_a_run_that_goes_on_later(stage, capsys, monkeypatch):
    stage.orders["seconds"] = 0.3
    log = stage.folder / "runs" / "camvid_comparison-cgds-seed0" / "metrics.jsonl"
    with monkeypatch.context() as patch:  # The minute is over once a step is done, however slow the machine is.
        clock = SimpleNamespace(monotonic=lambda: 60.0 if log.exists() else 0.0, sleep=time.sleep)
        patch.setattr(stage.tables, "time", clock)
        assert stage.main("--scale=cpu", "--seeds=1", "--only=cgds", "--minutes=1") == 0
    steps = log.read_text().splitlines()
    assert 0 < len(steps) < 10 and "0 of 1 runs are finished, 0 failed\nleft, in" in capsys.readouterr().out
    assert not (stage.folder / "docs" / "results").exists()
    stage.orders["seconds"] = 0
    config = json.loads((log.parent / "config.json").read_text())
    other = config | {"evaluation": config["evaluation"] | {"scales": [1.0]}}
    for split, step, of in ("train", 10, config), ("val", 5, config), ("val", 10, other):  # By hand: not for a table.
        (folder := log.parent / "evaluation" / f"{split}{step}").mkdir(parents=True)
        results = {"protocol": "ss", "split": split, "checkpoint_step": step, "config": of, "miou": 0.99}
        (folder / "results.json").write_text(json.dumps(results))
    assert stage.main("--scale=cpu", "--seeds=1", "--only=cgds") == 0
    assert stage.facts("camvid_comparison-cgds-seed0")["scores"]["ss"]["miou"] == 0.5
    assert log.read_text().splitlines()[: len(steps)] == steps
    assert stage.calls() == ["train camvid_comparison-cgds-seed0"] * 2 + ["evaluate camvid_comparison-cgds-seed0 ss"]
    stage.main("--scale=cpu", "--minutes=0")
    assert stage.calls() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_under_way_once(stage, number, code):
    stage.orders["seconds"] = 0.3
    log = stage.folder / "runs" / "camvid_comparison-regular-seed0" / "metrics.jsonl"

    def stop_after_a_step():
        while not log.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_after_a_step, daemon=True).start()
    assert stage.main("--scale=cpu", "--seeds=1") == code
    assert stage.calls() == ["train camvid_comparison-regular-seed0"]
    assert 0 < len(log.read_text().splitlines()) < 10


def test_a_training_that_was_left_behind_keeps_others_out(stage, capsys):
    (stage.folder / "runs").mkdir()
    with stage.tables.locked(stage.folder / "runs") as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
        os.pwrite(lock, str(left.pid).encode(), 0)
    assert stage.main("--scale=cpu") == 1
    assert f"a training that it left behind (process {left.pid})" in capsys.readouterr().err
    left.communicate(b"\n")
    assert stage.main("--scale=cpu", "--only=cgds", "--seeds=1") == 0


def test_other_scales_than_the_config_s_make_a_trial(stage):
    fields = ("--config.evaluation.scales=(1.0,)",)
    assert stage.main("--scale=cpu", "--seeds=1", "--only=cgds", fields=fields) == 0
    assert stage.page.read_text() == PAGE and not (stage.folder / "docs" / "results").exists()
    assert row_of(stage.folder / "runs" / "trial" / "results.md", "DSNet")[3] == "50.00"


def test_a_trial_is_never_a_result(stage, capsys):
    fields = ("--config.training.epochs=1",)
    assert stage.main("--scale=cpu", "--seeds=1", "--only=cgds", fields=fields) == 0
    assert stage.page.read_text() == PAGE
    assert not (stage.folder / "docs" / "results").exists()
    trial = stage.folder / "runs" / "trial"
    page = (trial / "results.md").read_text()
    assert page.startswith("# A trial, no results: --config.training.epochs=1")
    assert row_of(trial / "results.md", "DSNet")[3] == "50.00"
    assert json.loads((trial / "results" / "camvid_comparison-cgds-seed0.json").read_text())["epochs"] == 1

    run = stage.runs.run_of(ROWS["cpu"][2], 0)
    with pytest.raises(InputError, match=r"is a trial and not collected: training.epochs: 40 -> 1"):
        stage.runs.collect(run, trial / run.name, run.load(), stage.folder / "docs" / "results")
    shutil.copytree(trial / "results", stage.folder / "docs" / "results")  # Whoever copies it does not get it shown.
    assert stage.main() == 0 and row_of(stage.page, "DSNet")[3] == "not run"
    assert "of another config than camvid_comparison.py:cgds is now, not shown: " in capsys.readouterr().err


def test_a_field_that_changes_nothing_makes_no_trial(stage):
    assert stage.main("--scale=cpu", "--seeds=1", "--only=cgds", fields=("--config.data.root=elsewhere",)) == 0
    assert stage.main() == 0 and row_of(stage.page, "DSNet")[3] == "50.00"
    assert "elsewhere" not in (stage.folder / "docs" / "results" / "camvid_comparison-cgds-seed0.json").read_text()


def test_one_training_is_scored_by_all_protocols_of_its_rows(stage):
    assert stage.main("--scale=paper") == 0
    assert stage.calls() == [
        "train big-seed0",
        "evaluate big-seed0 ss",
        "evaluate big-seed0 flip",
        "train big-tuned-seed0",
        "predict big-tuned-seed0 flip",
    ]
    assert row_of(stage.page, "base")[1:6] == ["80.98", "50.00", "`ss`", "0", "10"]
    assert row_of(stage.page, "base, flip")[1:3] == ["81.63", "51.00"]
    assert row_of(stage.page, "tuned")[2] == "trained; the server has to score it"
    answer = stage.folder / "docs" / "results" / "big-tuned-seed0.server.json"
    answer.write_text('{"miou": 0.851, "url": "http://host.robots.ox.ac.uk:8080/anonymous/X.html"}')
    assert stage.main() == 0
    assert row_of(stage.page, "tuned")[2] == "85.10: [answer](http://host.robots.ox.ac.uk:8080/anonymous/X.html)"
    assert row_of(stage.page, "another")[1:3] == ["62.2", "*published*"]
    assert "--config.init_from=runs/big-seed0 --workdir=runs/big-tuned-seed0" in stage.page.read_text()
    facts = stage.facts("big-seed0")
    del facts["scores"]["flip"]  # As if that row had been added since.
    (stage.folder / "docs" / "results" / "big-seed0.json").write_text(json.dumps(facts))
    assert stage.main() == 0 and row_of(stage.page, "base, flip")[2] == "not run"
    assert stage.main("--scale=paper") == 0 and row_of(stage.page, "base, flip")[2] == "51.00"
    assert stage.calls() == ["train big-seed0"]  # Which has nothing to do, and the evaluation is there.
    shutil.rmtree(stage.folder / "runs")
    assert stage.main("--scale=paper") == 0 and stage.calls() == []


def test_what_a_chosen_run_starts_from_is_done_too(stage):
    assert stage.main("--scale=paper", "--only=tuned") == 0
    assert [call for call in stage.calls() if call.startswith("train")] == ["train big-seed0", "train big-tuned-seed0"]


def test_nothing_starts_from_a_run_that_is_not_finished(stage, capsys):
    stage.orders["broken"] = ["big-seed0"]
    assert stage.main("--scale=paper", "--only=tuned") == 1
    assert stage.calls() == ["train big-seed0"]
    assert "starts from big-seed0, which is not finished" in capsys.readouterr().err


def test_where_the_workdir_to_start_from_is_elsewhere_it_is_said_what_to_do(stage, capsys):
    assert stage.main("--scale=paper", "--only=tuned") == 0
    results = stage.folder / "docs" / "results"
    (results / "big-tuned-seed0.json").unlink()
    shutil.rmtree(stage.folder / "runs")
    stage.calls()
    assert stage.main("--scale=paper", "--only=tuned") == 1 and stage.calls() == []
    told = capsys.readouterr().err
    base = f"{stage.folder}/runs/big-seed0"
    assert (
        f"{base} is not there: copy it from where it was trained, or remove {results}/big-seed0.json and {base}" in told
    )


def test_a_workdir_that_is_not_that_of_the_facts_is_no_start(stage, capsys):
    assert stage.main("--scale=paper", "--only=tuned") == 0
    (stage.folder / "docs" / "results" / "big-tuned-seed0.json").unlink()
    base = stage.folder / "runs" / "big-seed0"
    config, log = (base / "config.json").read_text(), (base / "metrics.jsonl").read_text()
    changed = from_json(config, "config.json")
    changed.model.dropout = 0.5
    other_seed = from_json(config, "config.json")
    other_seed.seed = 7
    shorter = "".join(line + "\n" for line in log.splitlines()[:2])
    stage.calls()
    for name, text, told in (
        ("config.json", to_json(changed), "is of another config (model.dropout: 0.1 -> 0.5)"),
        ("config.json", to_json(other_seed), "has another seed, 7"),
        ("metrics.jsonl", shorter, "was trained for 2 steps, not 10"),
    ):
        (base / name).write_text(text)
        assert stage.main("--scale=paper", "--only=tuned") == 1 and stage.calls() == []
        assert f"{base} {told}: copy it" in capsys.readouterr().err
        (base / "config.json").write_text(config)
        (base / "metrics.jsonl").write_text(log)
    assert stage.main("--scale=paper", "--only=tuned") == 0


def test_results_whose_workdir_is_elsewhere_are_not_replaced_for_another_protocol(stage, capsys):
    assert stage.main("--scale=paper", "--only=big-seed0") == 0
    file = stage.folder / "docs" / "results" / "big-seed0.json"
    facts = stage.facts("big-seed0")
    del facts["scores"]["flip"]
    file.write_text(json.dumps(facts))
    shutil.rmtree(stage.folder / "runs" / "big-seed0")
    stage.calls()
    assert stage.main("--scale=paper", "--only=big-seed0") == 1 and stage.calls() == []
    assert "runs/big-seed0 is not there: copy it from where it was trained, or remove" in capsys.readouterr().err
    assert json.loads(file.read_text()) == facts and not (stage.folder / "runs" / "big-seed0").exists()


def test_fields_without_runs_are_refused(stage, capsys):
    with pytest.raises(SystemExit):
        stage.main("--config.training.epochs=1")
    assert "'--config.training.epochs=1' is of no use without --scale" in capsys.readouterr().err


def test_facts_tell_what_a_run_started_from(stage, capsys):
    assert stage.main("--scale=paper") == 0 and stage.main("--scale=cpu", "--seeds=1", "--only=cgds") == 0
    names = "big-seed0", "big-tuned-seed0", "camvid_comparison-cgds-seed0"
    assert [stage.facts(name)["experiment"]["init_from"] for name in names] == ["weights/resnet50", "big-seed0", ""]
    for name in names:  # As facts without the field were, all of them of runs from the seed.
        facts = stage.facts(name)
        del facts["experiment"]["init_from"]
        (stage.folder / "docs" / "results" / f"{name}.json").write_text(json.dumps(facts))
    assert stage.main() == 0
    shown = [row_of(stage.page, system)[2] for system in ("base", "tuned")]
    assert shown == ["not run", "not run"] and row_of(stage.page, "DSNet")[3] == "50.00"
    assert "not shown: init_from:  -> weights/resnet50" in capsys.readouterr().err
    (stage.folder / "docs" / "results" / "big-seed0.json").unlink()
    from_seed = stage.runs.run_of(ROWS["paper"][0]["rows"][0], 0).load(["--config.init_from="])
    (stage.folder / "runs" / "big-seed0" / "config.json").write_text(to_json(from_seed))
    run = stage.runs.planned("paper", 1)[0]
    with pytest.raises(InputError, match="is a trial and not collected: init_from: weights/resnet50 -> "):
        stage.runs.collect(run, stage.folder / "runs" / run.name, run.load(), stage.folder / "docs" / "results")


def test_every_seed_that_is_there_is_shown_where_it_has_the_protocol(stage):
    assert stage.main("--scale=paper") == 0
    facts, results = stage.facts("big-seed0"), stage.folder / "docs" / "results"
    del facts["scores"]["flip"]
    (results / "big-seed12.json").write_text(json.dumps(facts | {"seed": 12, "hardware": "a bird"}))
    assert stage.main() == 0
    assert row_of(stage.page, "base")[4:7] == ["0, 12", "10", "2 cores of a test, a bird"]
    assert row_of(stage.page, "base, flip")[4:7] == ["0", "10", "2 cores of a test"]


def test_every_version_that_trained_a_run_is_kept(stage, monkeypatch):
    stage.orders["broken"] = ["big-seed0"]
    for version, broken in ("a", ["big-seed0"]), ("a", ["big-seed0"]), ("b", []):
        monkeypatch.setattr(stage.runs, "_version", lambda version=version: version)
        stage.orders["broken"] = broken
        stage.main("--scale=paper", "--only=big-seed0")
    assert stage.facts("big-seed0")["version"] == "a, b"
    facts = stage.facts("big-seed0")
    del facts["scores"]["flip"]
    (stage.folder / "docs" / "results" / "big-seed0.json").write_text(json.dumps(facts))
    monkeypatch.setattr(stage.runs, "_version", lambda: "c")  # Which only scores.
    assert stage.main("--scale=paper", "--only=big-seed0") == 0 and stage.facts("big-seed0")["version"] == "a, b"


def test_a_version_is_dirty_where_what_computes_is(scripts, monkeypatch, tmp_path):
    runs = scripts[1]
    monkeypatch.setattr(runs, "REPOSITORY", tmp_path)
    for name in "configs", "docs":
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for command in ["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", "a"]:
        subprocess.run([*git, *command], check=True)
    (tmp_path / "docs" / "a").write_text("2")
    assert re.fullmatch(r"\S+ \([0-9a-f]+\)", runs._version())
    (tmp_path / "configs" / "a").write_text("2")
    assert re.fullmatch(r"\S+ \([0-9a-f]+-dirty\)", runs._version())


def test_a_page_without_its_markers_is_left_alone(stage, capsys):
    stage.page.write_text(page := PAGE.replace("<!-- to here: cpu -->", ""))
    assert stage.main("--scale=cpu") == 1
    assert "are needed, each once" in capsys.readouterr().err
    assert stage.page.read_text() == page and stage.calls() == []


@pytest.mark.parametrize(
    "flag",
    [
        "--config=x.py",
        "--config.seed=3",
        "--config.init_from=x",
        "--config.init_from=",
        "--scales=cpu",
        "--seeds=0",
        "--seeds=-1",
    ],
)
def test_flags_that_are_the_tables_own_or_no_number_of_seeds_are_refused(stage, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        stage.tables.main(["--scale=cpu", flag])
    assert flag in capsys.readouterr().err


def test_the_time_of_all_runs_is_told_from_the_pace_of_one(scripts, monkeypatch):
    tables, now = scripts[0], [100.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    eta, known = tables.Eta(others=2, typical=None), tables.Eta(others=2, typical=30.0)
    assert eta.of("step 50/100  loss 1.0") == known.of("step 50/100  loss 1.0") == eta.of("step 50: mIoU 0.5") == ""
    now[0] += 10
    assert eta.of("step 60/100  loss 1.0") == "  all runs 0:04:00"  # 40 steps of a second, and twice 100 of them.
    assert known.of("step 60/100  loss 1.0") == "  all runs 0:01:40"


def test_the_hardware_is_named(scripts):
    assert scripts[1].hardware().startswith(f"{len(os.sched_getaffinity(0))} cores of ")
