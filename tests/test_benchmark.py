"""scripts/benchmark.py in small: every benchmark without PyTorch, and with something else in its place."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from dsnet_jax.models.resnet import RESNETS

ROOT = Path(__file__).parents[1]
MODULES = (
    "benchmark",
    "benchmarks.harness",
    *(f"benchmarks.{name}" for name in ("operator", "network", "pipeline", "training", "evaluation", "exported")),
)

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """The user's own compilation cache is left alone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))


@pytest.fixture
def scripts(monkeypatch, tiny_backbone):
    """The modules of scripts/benchmark.py by name, and the processors that were asked for."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(modules["harness"], "PAUSE_SECONDS", 0)
    monkeypatch.setitem(RESNETS, "resnet18", tiny_backbone)
    pinned = modules["pinned"] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, processors: pinned.append(list(processors)))
    yield modules
    for name in ("benchmarks", *MODULES):
        sys.modules.pop(name)


@pytest.fixture
def camvid(tmp_path) -> Path:
    """A folder as CamVid's, of two small pictures."""
    rng = np.random.default_rng(0)
    for folder, shape in (("train", (24, 32, 3)), ("trainannot", (24, 32))):
        (tmp_path / "camvid" / folder).mkdir(parents=True)
        for index in range(2):
            cv2.imwrite(str(tmp_path / "camvid" / folder / f"{index}.png"), rng.integers(0, 12, shape, np.uint8))
    return tmp_path / "camvid"


@pytest.fixture
def flags(rooms, camvid, monkeypatch, scripts) -> dict[str, list[str]]:
    """By benchmark, what makes it small."""
    ours = scripts["pipeline"].OURS
    monkeypatch.delitem(ours, "workers")  # Starting processes takes seconds.
    monkeypatch.setattr(scripts["pipeline"], "READY_BATCHES", 1)
    monkeypatch.setattr(
        scripts["pipeline"], "COMPARED", [pair for pair in scripts["pipeline"].COMPARED if pair[0] in ours]
    )
    return {
        "operator": ["--shape", "1", "4", "4", "2", "--kernel=1"],
        "network": ["--backbone=resnet18", "--width=8", "--batch=8", "--size-hw", "32", "32", "--classes=3"],
        "pipeline": [f"--source={camvid}", "--pictures=2", "--batches=1"],
        "evaluation": [
            f"--config={ROOT / 'configs' / 'camvid_dsnet_r18.py'}",
            f"--config.data.root={rooms}",
            "--config.data.name=rooms",
            "--config.model.width=8",
        ],
    }


def write_peer(file: Path, answer: str) -> Path:
    """What can be given as --peer-python: it answers whatever it is asked for."""
    versions = json.dumps({"torch": "of a test"})
    code = f"import sys\nprint({versions!r}, flush=True)\nfor line in sys.stdin:\n    print({answer!r}, flush=True)\n"
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(0o755)
    return file


def check(found: dict, table: str, tasks: dict[str, int]) -> None:
    """The file says when and on what, and what each side took; the table has a row for each pair, and who was not run.

    `tasks` is the number of sides by task.
    """
    assert found["threads"] == 1 and found["options"]["rounds"] == 1
    assert found["processor"] and found["date"].startswith("20") and "jax" in found["versions"]
    assert found["peer_versions"] is None
    assert {task["task"]: len(task["seconds"]) for task in found["tasks"]} == tasks
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for task in found["tasks"]:
        theirs = {side for side, seconds in task["seconds"].items() if seconds is None}
        assert theirs and all("PyTorch" in side or "DataLoader" in side for side in theirs)
        for side in task["seconds"].keys() - theirs:
            assert task["seconds"][side] == [task["median_seconds"][side]] and task["median_seconds"][side] > 0
        for pair in task["comparisons"]:
            [row] = [
                row for row in rows if f"| {task['task']} | {pair['ours']} | " in row and pair["compared_with"] in row
            ]
            assert (pair["ratio_of_medians"] is None) == (pair["compared_with"] in theirs)
            assert row.count("not run") == (3 if pair["compared_with"] in theirs else 0)  # Its median, both ratios.


@pytest.mark.parametrize(
    ("command", "tasks"),
    [
        ("operator", {"forward": 4, "gradient": 4}),
        ("network", {"inference": 2, "training": 2}),
        ("pipeline", {f"{name}{kind}": 7 for name in ("camvid_png", "voc_size_jpeg") for kind in ("", ", per core")}),
    ],
)
def test_without_a_peer_our_sides_are_measured_and_the_table_says_that_the_others_were_not(
    scripts, flags, command, tasks, tmp_path, capsys
):
    file = tmp_path / "new" / "found.json"
    assert scripts["benchmark"].main([command, "--rounds=1", "--threads=1", f"--json={file}", *flags[command]]) == 0
    assert [len(processors) for processors in scripts["pinned"]] == [1]
    check(json.loads(file.read_text()), capsys.readouterr().out, tasks)


def test_an_evaluation_says_how_many_programs_it_compiled_and_how_much_was_padding(scripts, flags, tmp_path, capsys):
    file = tmp_path / "found.json"
    arguments = ["evaluation", "--rounds=1", "--threads=1", f"--json={file}", *flags["evaluation"]]
    assert scripts["benchmark"].main(arguments) == 0
    found = json.loads(file.read_text())
    check(found, capsys.readouterr().out, {"rooms val": 2})
    images, programs, padded, filling = found["figures"]["dsnet_jax, ss"].values()
    # Halved, all of them fit on a canvas of 32x32; eight devices take eight images at a time.
    assert (images, programs, filling) == (11, 1, 16 - 11)
    assert padded > 16 / 11


def test_exported_networks_are_timed_beside_ours_and_give_its_labels(scripts, random_run, tmp_path, capsys):
    file = tmp_path / "found.json"
    arguments = ["exported", "--rounds=1", "--threads=1", f"--json={file}", f"--workdir={random_run}"]
    assert scripts["benchmark"].main([*arguments, "--size-hw", "33", "64"]) == 0
    found = json.loads(file.read_text())
    [task] = found["tasks"]
    assert set(task["seconds"]) == {"dsnet_jax", "StableHLO, any size", "StableHLO, this size", "ONNX, onnxruntime"}
    assert found["figures"]["images"] == {"of this size": 3}
    assert min(found["figures"]["pixels labelled as by ours, percent"].values()) > 99.9
    assert capsys.readouterr().out.count("| an image of 33 x 64 | dsnet_jax |") == 3
    assert scripts["benchmark"].main([*arguments, "--size-hw", "33", "65"]) == 1
    assert "has no image of (33, 65)" in capsys.readouterr().err


def test_the_network_of_a_run_is_evaluated_by_each_protocol(scripts, random_run, tmp_path, monkeypatch):
    given = []

    def evaluate(model, variables, split, config, protocol):
        given.append((protocol.name, "cgds" in variables["params"], split.name, config.model.width))
        return SimpleNamespace(matrix=np.ones((3, 3), int), images=11, padding_images=0, padded_share=1.0)

    monkeypatch.setattr(scripts["evaluation"], "evaluate", evaluate)
    arguments = ["evaluation", "--threads=1", "--rounds=1", f"--workdir={random_run}", "--protocols", "flip"]
    assert scripts["benchmark"].main([*arguments, f"--json={tmp_path / 'found.json'}"]) == 0
    assert given == [("ss", True, "val", 8), ("flip", True, "val", 8)] * 2  # The first round warms up.
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["figures"]) == ["dsnet_jax, ss", "dsnet_jax, flip"]
    pairs = [(pair["ours"], pair["compared_with"]) for pair in found["tasks"][0]["comparisons"]]
    assert pairs == [("dsnet_jax, ss", "PyTorch, image by image"), ("dsnet_jax, flip", "dsnet_jax, ss")]


PLAYED_TRAINING = """
import json, os, sys
from pathlib import Path

with open("{calls}", "a") as calls:
    print(*sys.argv[1:], file=calls)
if os.path.exists(os.environ["JAX_COMPILATION_CACHE_DIR"]):
    sys.exit("dsnet: what was compiled before is there")
if "--config.training.epochs=3" in sys.argv:
    sys.exit("dsnet: no such data")
workdir = Path(sys.argv[-1].removeprefix("--workdir="))
workdir.mkdir()
lines = dict(step=1, val_miou=0.25, val_pixel_accuracy=0.5), dict(step=1, loss=1.0)
(workdir / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)))
"""


@pytest.fixture
def played_train(scripts, monkeypatch, tmp_path):
    """In the place of `dsnet`: writes what a training writes, and the arguments that it was given."""
    program = tmp_path / "dsnet.py"
    program.write_text(PLAYED_TRAINING.format(calls=tmp_path / "called.txt"))
    monkeypatch.setattr(scripts["training"], "DSNET", [sys.executable, str(program)])
    return tmp_path / "called.txt"


def test_whole_trainings_take_turns_and_their_scores_are_told(scripts, flags, played_train, tmp_path, capsys):
    answer = {"seconds": 1000.0, "result": {"mIoU": 0.125, "pixel accuracy": 0.5}}
    peer = write_peer(tmp_path / "python", json.dumps(answer))
    arguments = ["training", "--rounds=2", "--threads=1", "--epochs=2", f"--peer-python={peer}", "--with-smp"]
    assert scripts["benchmark"].main([*arguments, *flags["evaluation"], f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    [task] = found["tasks"]
    assert task["task"] == "2 epochs" and [len(seconds) for seconds in task["seconds"].values()] == [2, 2, 2]
    assert all(pair["ratio_of_medians"] > 100 for pair in task["comparisons"])
    assert found["figures"]["dsnet_jax, scores of the last training"] == {"mIoU": 0.25, "pixel accuracy": 0.5}
    assert found["figures"]["PyTorch, the same network, scores of the last training"]["mIoU"] == 0.125
    calls = played_train.read_text().splitlines()
    assert len(calls) == 2 and all("--config.training.epochs=2 --workdir=" in call for call in calls)
    assert calls[0] != calls[1]  # A fresh workdir each.
    assert "not run" not in capsys.readouterr().out


def test_a_training_that_pytorchs_side_does_not_do_is_refused(scripts, flags, played_train, capsys):
    arguments = ["training", "--rounds=1", "--peer-python=python", *flags["evaluation"]]
    assert scripts["benchmark"].main([*arguments, "--config.training.ema_decay=0.9"]) == 2
    assert "config.training.ema_decay=0.9: PyTorch's side does not train so" in capsys.readouterr().err
    assert not played_train.exists()


def test_a_training_that_fails_is_told_in_one_line(scripts, flags, played_train, capsys):
    assert scripts["benchmark"].main(["training", "--threads=1", "--epochs=3", *flags["evaluation"]]) == 1
    assert "benchmark: dsnet train ended with exit code 1: dsnet: no such data" in capsys.readouterr().err


def test_ratios_say_how_many_times_as_fast_ours_is(scripts, flags, tmp_path, capsys):
    peer = write_peer(tmp_path / "python", json.dumps({"seconds": 1000.0, "result": None}))
    arguments = ["operator", "--rounds=3", "--threads=1", f"--peer-python={peer}", f"--json={tmp_path / 'found.json'}"]
    assert scripts["benchmark"].main([*arguments, *flags["operator"]]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["peer_versions"] == {"torch": "of a test"}
    for task in found["tasks"]:
        times, [torch, *others] = task["seconds"], task["comparisons"]
        assert times[torch["compared_with"]] == [1000.0] * 3
        ours = task["median_seconds"][torch["ours"]]
        assert torch["ratio_of_medians"] == torch["median_of_ratios"] == pytest.approx(1000 / ours)
        for other in others:
            assert other["ratio_of_medians"] == pytest.approx(task["median_seconds"][other["compared_with"]] / ours)
    assert "not run" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["operator", "--rounds=0"], ["exported", "--peer-python=python"]])
def test_what_no_benchmark_can_do_is_refused_by_its_flag(scripts, arguments, capsys):
    needed = ["--workdir=x", "--size-hw", "8", "8"] if arguments[0] == "exported" else []
    with pytest.raises(SystemExit) as ended:
        scripts["benchmark"].main([*arguments, *needed])
    assert ended.value.code == 2
    assert arguments[1].partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_exported_networks_without_onnxruntime_are_refused_before_any_work(scripts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert scripts["benchmark"].main(["exported", "--threads=1", "--workdir=x", "--size-hw", "8", "8"]) == 2
    assert "onnxruntime is not installed" in capsys.readouterr().err


def test_our_network_sees_its_images_on_the_canvas_of_an_evaluation(scripts, monkeypatch):
    # The fixed list of canvases goes from 512 to 576.
    seen = []
    program = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=0))
    monkeypatch.setattr(scripts["network"], "lower_step", lambda *_: SimpleNamespace(compile=lambda: program))
    monkeypatch.setattr(scripts["network"], "Segmenter", lambda *_: lambda batch: seen.append(batch.images.shape))
    options = {"backbone": "resnet18", "width": 8, "output_stride": 16, "batch": 8, "size_hw": [528, 544], "classes": 3}
    work, _ = scripts["network"]._ours(argparse.Namespace(**options))
    work["inference"]()
    assert seen == [(8, 544, 544, 3)]


def test_the_two_ratios_differ_where_the_machine_changes_its_pace(scripts):
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 2.0, 16.0], "not here": None}
    task = scripts["harness"].Task("work", seconds, [("ours", "theirs")])
    assert task.ratios("ours", "theirs") == (1.5, 3.0)
    assert task.ratios("ours", "not here") is None


def test_sides_take_turns_of_which_the_last_call_counts(scripts):
    calls = []

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    sides = {"a": lambda: side("a"), "none": None, "b": lambda: side("b")}
    found = scripts["harness"].in_turns(sides, argparse.Namespace(rounds=2), calls=2, warm_up=1)
    assert "".join(calls) == "aabb" * 3
    assert found == {"a": [6, 10], "none": None, "b": [8, 12]}


@pytest.mark.parametrize("command", ["network", "evaluation"])
def test_sides_that_do_not_do_the_same_work_are_not_compared(scripts, flags, command, tmp_path, monkeypatch):
    peer = write_peer(tmp_path / "python", json.dumps({"seconds": 1.0, "result": 8}))
    monkeypatch.setattr(scripts["network"], "_ours", lambda options: ({}, {"parameters": 9}))
    counted = SimpleNamespace(matrix=np.ones((3, 3), int))
    monkeypatch.setattr(scripts["evaluation"], "evaluate", lambda *arguments, protocol: counted)
    with pytest.raises(RuntimeError, match="not the same"):
        scripts["benchmark"].main([command, "--rounds=1", "--threads=1", f"--peer-python={peer}", *flags[command]])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["operator", "--threads=100000"], 2, "--threads is 100000"),
        (["operator", "--peer-python=/nowhere/python"], 1, "/nowhere/python cannot be run (No such file"),
        (["operator", "--peer-python=/bin/true"], 1, "operator_torch.py ended with exit code 0"),
        (["network", "--size-hw", "40", "32"], 2, "multiples of --output-stride"),
        (["network", "--batch=1"], 2, "normalised over the batch"),
        (["network", "--batch=3"], 2, "batch_size is 3, which 8 devices cannot share equally"),
        (["operator", "--kernel=2"], 2, "--kernel is 2: a positive odd number is needed"),
        (["evaluation", "--peer-python=/bin/true", "--config.model.stem=v1c"], 2, "config.model.stem='v1c': PyTorch"),
        (["evaluation", "--peer-python=/bin/true", "--split=test"], 1, "has no labels to score"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(scripts, flags, arguments, code, message, capsys):
    threads = [] if any("threads" in argument for argument in arguments) else ["--threads=1"]
    assert scripts["benchmark"].main([arguments[0], *flags[arguments[0]], *arguments[1:], *threads]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark: ") and message in line
