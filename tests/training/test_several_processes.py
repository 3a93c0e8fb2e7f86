"""Training in two processes of two devices each, on this machine, against one process of four devices."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.config import to_json
from dsnet_jax.data.prepare import prepare
from dsnet_jax.training.loop import train

DSNET = """
import sys
from pathlib import Path

import jax

tests, command, config, workdir, hosts, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
sys.path.insert(0, tests)
from conftest import FourConvolutions
from dsnet_jax import cli
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.training import loop

RESNETS["resnet18"] = FourConvolutions
config_file = Path(workdir).with_name(f"config{process}.py")
config_file.write_text(
    "from dsnet_jax.config import from_json\\n"
    f"def get_config():\\n    return from_json({Path(config).read_text()!r}, 'config')\\n"
)
together = [f"--hosts={hosts}", f"--process={process}"]
of_training = [f"--config={config_file}"] if command == "train" else []
sys.exit(cli.main([command, *of_training, f"--workdir={workdir}", *together]))
"""


def start(config, workdir, process, port, command="train"):
    arguments = [Path(__file__).parents[1], command, config, workdir, f"127.0.0.1:{port},127.0.0.1", process]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.Popen(
        [sys.executable, "-c", DSNET, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def start_two(config, workdir, command="train"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(config, workdir, process, port, command) for process in range(2)]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def await_step(two, step):
    for line in two[0].stdout:
        if line.startswith(f"step {step}/"):
            return


def assert_agree(ours, theirs):
    """Their losses and scores."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name, tolerance in (("loss", 1e-6), ("gradient_norm", 1e-4), ("val_miou", 0)):
        values, expected = ([line[name] for line in run if name in line] for run in (ours, theirs))
        np.testing.assert_allclose(values, expected, rtol=tolerance)


@pytest.fixture
def config_file(small_config, tmp_path):
    small_config.training.update(epochs=8, evaluate_every_epochs=2, checkpoint_every_steps=100)  # 24 steps.
    small_config.optimizer.base_lr = 0.01
    (tmp_path / "config.json").write_text(to_json(small_config))
    return tmp_path / "config.json"


def test_two_processes_train_and_score_as_one_stop_together_and_go_on(config_file, small_config, tmp_path, monkeypatch):
    """From the weights of another run, with batches in two parts and averages of the weights."""
    train(small_config, tmp_path / "before")
    small_config.init_from = str(tmp_path / "before")
    small_config.training.update(ema_decay=0.5, accumulation_steps=2)
    config_file.write_text(to_json(small_config))
    mesh = parallel.mesh_over(jax.devices()[:4])
    monkeypatch.setattr(parallel, "global_mesh", lambda: mesh)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    train(small_config, tmp_path / "one")
    by_one = lines(tmp_path / "one")
    assert [line["step"] for line in by_one if "val_miou" in line] == [6, 12, 18, 24]

    two = start_two(config_file, tmp_path / "two")
    await_step(two, 8)
    two[1].send_signal(signal.SIGTERM)  # Only one of them is told.
    ends = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [143, 143], ends
    stopped_at = Checkpoints(tmp_path / "two", read_only=True).steps()[-1]
    assert 8 <= stopped_at < 24 and f"step {stopped_at}: saved" in ends[0][0]

    shutil.copytree(tmp_path / "two", tmp_path / "then_one")
    train(small_config, tmp_path / "then_one")  # One process goes on from where two have saved.
    assert_agree(lines(tmp_path / "then_one"), by_one)

    two = start_two(config_file, tmp_path / "two")
    ends = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [0, 0], ends
    assert "step" in ends[0][0] and "step" not in ends[1][0]  # Only the main process prints, but for Gloo itself.
    assert_agree(lines(tmp_path / "two"), by_one)

    two = start_two(config_file, tmp_path / "two", "evaluate")
    ends = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [0, 0], ends
    assert "written to" in ends[0][0] and "written to" not in ends[1][0]
    results = json.loads((tmp_path / "two/evaluation/val/results.json").read_text())
    assert results["miou"] == by_one[-1]["val_miou"]


def test_the_death_of_a_process_ends_the_other_with_its_name(config_file, tmp_path):
    two = start_two(config_file, tmp_path / "two")
    await_step(two, 4)
    two[1].kill()
    _, errors = two[0].communicate(timeout=60)
    two[1].communicate()
    assert two[0].returncode == 1
    assert f"process 1 ({socket.gethostname()}, pid {two[1].pid}) has died" in errors


@pytest.mark.parametrize("data", ["none", "others"])
def test_what_one_process_cannot_use_ends_both_with_its_message(data, config_file, small_config, rooms, tmp_path):
    small_config.data.root = str(tmp_path / "datasets")
    if data == "others":
        shutil.copytree(rooms.parent / "source", tmp_path / "source")
        shutil.copy(tmp_path / "source/images/train/room00.png", tmp_path / "source/images/train/room04.png")
        prepare("folder", str(tmp_path / "source"), small_config.data.root, name="rooms")
    (tmp_path / "other.json").write_text(to_json(small_config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    good = start(config_file, tmp_path / "two", 0, port)
    bad = start(tmp_path / "other.json", tmp_path / "two", 1, port)
    outputs = [process.communicate(timeout=120) for process in (good, bad)]
    assert [process.returncode for process in (good, bad)] == [1, 1], outputs
    message = {
        "none": "data set 'rooms' is not prepared",
        "others": "rooms, split train is not the same in all processes",
    }[data]
    assert message in outputs[0][1] and message in outputs[1][1]
    assert not (tmp_path / "two" / "checkpoints").exists()
