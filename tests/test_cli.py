"""The `dsnet` command: what it says, and what it gives back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from PIL import Image

from dsnet_jax import cli
from dsnet_jax.config import to_json
from dsnet_jax.errors import InputError

COMMANDS = sorted(cli.COMMANDS)
ROOT = Path(__file__).parents[1]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.fixture
def called(monkeypatch):
    """What a command is given, with every command replaced: a list of options."""
    calls = []
    for name in COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, calls.append)
    return calls


def failing(monkeypatch, error):
    def command(options):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "evaluate", command)


def help_of(command, capsys, *subject):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *subject, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS), ["trian"]])
def test_help_and_misspellings_are_answered_without_importing_jax(arguments):
    code = f"""
import sys
from dsnet_jax import cli
try:
    cli.main({arguments})
except SystemExit:
    pass
slow = {{"jax", "flax", "numpy", "cv2", "tensorflow_datasets", "orbax", "matplotlib", "rich"}} & set(sys.modules)
assert not slow, slow
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr


def test_a_misspelt_field_is_told_without_importing_jax():
    """The config is read before the rest is imported."""
    code = f"""
import sys
from dsnet_jax import cli
config = "--config={ROOT}/configs/shapes_quickstart.py"
assert cli.main(["train", "--workdir=nowhere", config, "--config.sede=1"]) == 2
assert "jax" not in sys.modules
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "dsnet: config: unknown field 'sede', did you mean 'seed'?\n"


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_that_is_understood(command, called, capsys):
    example = help_of(command, capsys).split("example:\n")[1].split()
    assert example[:2] == ["dsnet", command]
    assert cli.main(example[1:]) == 0
    (options,) = called
    assert options.command == command


@pytest.mark.parametrize("subject", ["model", "data", "points", "submission"])
def test_every_help_of_inspect_has_an_example_that_is_understood(subject, called, capsys):
    example = help_of("inspect", capsys, subject).split("example:\n")[1].split()
    assert example[:3] == ["dsnet", "inspect", subject]
    assert cli.main(example[1:]) == 0
    assert called[0].subject == subject


def test_the_examples_of_the_help_name_configs_that_are_there(called, capsys):
    for command in ("train", "inspect"):
        cli.main(help_of(command, capsys).split("example:\n")[1].split()[1:])
        config = next(flag for flag in called.pop().config_flags if flag.startswith("--config="))
        assert "get_config" in (ROOT / config.removeprefix("--config=")).read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["evalaute", "--workdir=x"], "did you mean 'evaluate'?"),
        (["xyz"], "the commands are prepare, train, evaluate, predict, inspect"),
        ([], "COMMAND"),
        (["evaluate"], "--workdir"),
        (["evaluate", "--workdir=x", "--sttep=3"], "'--sttep=3'"),
        (["evaluate", "--work=x"], "--workdir"),  # No abbreviations: a new flag could change their meaning.
        (["evaluate", "--workdir=x", "--config.seed=1"], "'--config.seed=1'"),
        (["evaluate", "--workdir=x", "--step=last"], "'last' is neither a step nor `best`"),
        (["evaluate", "--workdir=x", "--step=-1"], "--step"),
        (["prepare", "camvidd"], "'camvidd'"),
        (["inspect"], "SUBJECT"),
        (["inspect", "--config=a.py"], "SUBJECT"),
        (["inspect", "modle"], "'modle'"),
        (["inspect", "data"], "--name"),
        (["inspect", "data", "--name=x", "--config=a.py"], "'--config=a.py'"),
        (["inspect", "points", "--workdir=x", "--position=3"], "'3' is not Y,X in pixels"),
        (["inspect", "points", "--workdir=x", "--position=3,a"], "'3,a' is not Y,X in pixels"),
        (["inspect", "submission", "--name=x"], "file"),
    ],
)
def test_a_command_line_that_cannot_be_used_is_one_line_and_code_2(arguments, message, called, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("dsnet: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == "" and not called


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "images and --output, or --split and --submission"),
        (["--output=y"], "images and --output"),
        (["a.png"], "images and --output"),
        (["--output=y", "--root=z", "a.png"], "images and --output"),
        (["--split=test"], "go together"),
        (["--submission=s.tgz"], "go together"),
        (["--split=test", "--submission=s.tgz", "a.png"], "without images"),
        (["--split=test", "--submission=s.tgz", "--output=y"], "without images"),
        (["--split=test", "--submission=s.tgz", "--max-pixels=9"], "or --max-pixels"),
    ],
)
def test_predict_wants_either_images_or_a_split(flags, message, capsys):
    assert cli.main(["predict", "--workdir=nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "function, arguments, advice",
    [
        ("evaluate.evaluate_run", ["evaluate"], cli.FEWER_IMAGES),
        ("predict.predict_files", ["predict", "--output=y", "a.png"], cli.SMALLER_IMAGES),
        ("submit.predict_submission", ["predict", "--split=test", "--submission=s.tgz"], cli.FEWER_IMAGES),
        ("sampling_pictures.draw_sampling_points", ["inspect", "points"], "a smaller evaluation.batch_size"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line_with_the_flags_that_help(
    function, arguments, advice, monkeypatch, capsys
):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.43GiB.")

    monkeypatch.setattr(f"dsnet_jax.evaluation.{function}", exhausted)
    monkeypatch.setattr("dsnet_jax.parallel.configure", lambda: None)
    assert cli.main([*arguments, "--workdir=x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsnet: out of memory: Out of memory while trying to allocate 12.43GiB: what helps is ")
    assert advice in error and error.count("\n") == 1


def test_an_input_error_is_one_line_on_stderr_with_its_code(monkeypatch, capsys):
    failing(monkeypatch, InputError("image.png: damaged: replace it"))
    assert cli.main(["evaluate", "--workdir=x"]) == 1
    assert capsys.readouterr() == ("", "dsnet: image.png: damaged: replace it\n")


def test_debug_shows_where_an_input_error_comes_from(monkeypatch):
    failing(monkeypatch, InputError("image.png: damaged: replace it"))
    with pytest.raises(InputError, match="damaged"):
        cli.main(["evaluate", "--workdir=x", "--debug"])


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    failing(monkeypatch, RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["evaluate", "--workdir=x"])


@pytest.mark.parametrize("number, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command, again", [("train", "goes on from what was saved"), ("evaluate", "begins anew")])
def test_a_signal_gives_its_exit_code_and_one_line(number, exit_code, command, again, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, command, lambda options: os.kill(os.getpid(), number))
    assert cli.main([command, "--workdir=runs/a"]) == exit_code
    error = capsys.readouterr().err
    assert error == f"dsnet: stopped by {number.name}; the same command {again}\n"


@pytest.mark.parametrize(
    "number, exit_code, there",
    [(signal.SIGINT, 130, ".shapes.incomplete"), (signal.SIGTERM, 143, ".shapes.incomplete/*")],
    ids=["drawing", "writing"],
)
def test_a_data_set_whose_preparation_is_stopped_is_not_there(number, exit_code, there, tmp_path):
    command = [sys.executable, "-m", "dsnet_jax", "prepare", "shapes", f"--root={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.glob(there)) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    last = errors.splitlines()[-1]  # Progress may stand before it, on a slow machine.
    assert last == f"dsnet: stopped by {number.name}; the same command begins anew"
    assert list(tmp_path.iterdir()) == []


def test_the_code_that_a_command_gives_is_the_codes_of_the_program(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "predict", lambda options: 1)
    assert cli.main(["predict", "--workdir=x", "--output=y", "image.png"]) == 1


def test_the_checkpoint_is_a_step_or_the_best(called):
    for step in ("best", "120"):
        cli.main(["evaluate", "--workdir=x", f"--step={step}"])
    assert [options.step for options in called] == ["best", 120]


def test_a_config_may_stand_anywhere_among_the_flags(called):
    cli.main(["train", "--config=a.py", "--config.seed=1", "--workdir=x", "--config.model.width=8"])
    assert called[0].workdir == "x"
    assert called[0].config_flags == ["--config=a.py", "--config.seed=1", "--config.model.width=8"]


def test_inspect_submission_checks_the_file_against_the_split(rooms, tmp_path, capsys):
    arguments = ["inspect", "submission", str(tmp_path / "a.zip"), "--name=rooms", f"--root={rooms}"]
    assert cli.main(arguments) == 1
    assert "no form of submission is known for rooms" in capsys.readouterr().err


def test_python_m_is_the_command():
    run = subprocess.run([sys.executable, "-m", "dsnet_jax", "trian"], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (2, "dsnet: unknown command 'trian': did you mean 'train'?\n")


def test_every_command_on_real_files_from_images_to_labels(tmp_path, rooms, small_config, capsys):
    """What the README says, on a small data set and with a small network."""
    source, data = rooms.parent / "source", tmp_path / "datasets"
    config = tmp_path / "rooms.py"
    config.write_text(
        "from dsnet_jax.config import default_config, from_json\n"
        f"def get_config():\n    return from_json({to_json(small_config)!r}, 'rooms')\n"
    )

    def dsnet(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (code, [line for line in printed.err.splitlines() if line.startswith("dsnet: ")]) == (0, [])
        return printed.out

    train = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.data.root={data}")
    assert "train: 27 images" in dsnet("prepare", "folder", f"--source={source}", f"--root={data}", "--name=rooms")
    assert "step 6: mIoU 0." in dsnet(*train, "--config.training.evaluate_every_epochs=2")
    assert "all 6 steps are done" in dsnet(*train, "--config.training.evaluate_every_epochs=2")
    assert "% mIoU (ss)" in dsnet("evaluate", f"--workdir={tmp_path / 'run'}", "--step=best")
    images = source / "images" / "test"
    assert "2 images labelled" in dsnet(
        "predict", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", images
    )
    assert "1 x 32 x 32 x 3, 3 classes" in dsnet("inspect", "model", *train[1:2], f"--config.data.root={data}")
    looked_at = dsnet("inspect", "data", "--name=rooms", f"--root={data}", f"--output={tmp_path / 'looked_at'}")
    assert "with labels" in looked_at and (tmp_path / "looked_at" / "train.png").exists()
    points = dsnet("inspect", "points", f"--workdir={tmp_path / 'run'}", "--images=1")
    assert f"drawn into {tmp_path / 'run' / 'sampling_points' / 'val'}: room00" in points

    assert (tmp_path / "run" / "evaluation" / "val" / "results.json").exists()
    for image in images.iterdir():
        with Image.open(image) as original, Image.open(tmp_path / "out" / image.name) as labels:
            assert labels.size == original.size and labels.mode == "P"
            assert set(labels.tobytes()) <= {0, 1, 2}
