"""What all tests share: eight CPU devices, a compilation cache, networks of random numbers, PyTorch's results."""

import contextlib
import gc
import importlib.util
import os
import resource
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.config import default_config, from_json, to_json
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.experiment import build_model
from dsnet_jax.models.layers import Conv, ConvNormRelu, max_pool
from dsnet_jax.models.resnet import RESNETS, BasicBlock
from dsnet_jax.training import loop, program
from dsnet_jax.workdir import claim_workdir, locked_workdir

TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Sets what must be set before the first computation."""
    gc.set_threshold(200_000, 20, 20)  # Traces are millions of objects; looking through them took a tenth of the time.
    jax.config.update("jax_num_cpu_devices", 8)
    # Most tests are of what a program computes, or of what is round it, and most of their time would be LLVM's: a step
    # takes 40 seconds to compile, without optimisations 18, with XLA's older code generator 7. Started processes too.
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "dsnet_jax" / "tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)  # Writing the others takes longer.
    # Where two runs write the same program, or one is killed as it writes, the cache warns and the program is compiled.
    config.addinivalue_line("filterwarnings", "default:Error (reading|writing) persistent compilation cache")
    # ml_collections reads config files so.
    config.addinivalue_line("filterwarnings", "ignore:the load_module.. method is deprecated:DeprecationWarning")
    flags.FLAGS.mark_as_parsed()  # absl.logging and TFDS read them; no `main` parses them here.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, one worker would have it and the others nothing."""
    items.sort(key=lambda item: item.path.name != "test_several_processes.py")


@pytest.fixture(autouse=True)
def hangup_not_ignored() -> Iterator[None]:
    """SIGHUP as usual, for the tests and the programs that they start, also where `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Compiles as a user's programs are compiled: for tests of the programs themselves."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """Counts programs of whatever kind that are compiled, or found in the compilation cache."""
    counted = []

    def count(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counted
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="session")
def random_variables() -> Callable[..., dict[str, Any]]:
    """Called with a module and its inputs, gives float32 variables in which nothing is 0 or 1 as it is at the start.

    Statistics and biases are such that zeros going in do not come out as zeros. Quicker than compiling `init`.
    """

    def draw(module: nn.Module, *inputs: Any, seed: int = 0, **arguments: Any) -> dict[str, Any]:
        shapes = jax.eval_shape(partial(module.init, **arguments), jax.random.key(0), *inputs)
        rng = np.random.default_rng(seed)

        def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            values = rng.standard_normal(leaf.shape, np.float32)
            if leaf.ndim == 4:
                return values * (2 / np.prod(leaf.shape[:3])) ** 0.5
            return 0.3 * values if path[-1].key in ("mean", "bias") else np.exp(0.3 * values)

        return jax.tree_util.tree_map_with_path(value, shapes)

    return draw


@pytest.fixture(scope="session")
def make_torch_fixtures() -> ModuleType:
    """scripts/make_torch_fixtures.py."""
    file = TESTS.parent / "scripts" / "make_torch_fixtures.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["frozen", "live"])
def torch_cases(request, make_torch_fixtures) -> Callable[[str, str], dict[str, dict[str, np.ndarray]]]:
    """Called with the folder and the name of a .npz file, gives its arrays by case and name: PyTorch's results.

    A test that uses it runs twice: on the frozen results, and where PyTorch is installed on fresh ones of another seed.
    """

    def load(folder: str, name: str) -> dict[str, dict[str, np.ndarray]]:
        if request.param == "live":
            pytest.importorskip("torch")
            arrays = getattr(make_torch_fixtures, name)(seed=1)
        else:
            with np.load(TESTS / folder / f"{name}.npz") as file:
                arrays = dict(file)
        cases: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            case, name_in_case = key.split("/")
            cases.setdefault(case, {})[name_in_case] = array
        return cases

    return load


def write_rooms(source: Path) -> None:
    """A data set of three classes for `dsnet prepare folder`: images of their labels' colours and of noise."""
    colours = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])
    sizes_hw = [(40, 56), (33, 64), (20, 30), (64, 61)]  # Canvases of 64x64 and 32x32.
    for split, count in (("train", 27), ("val", 11), ("test", 2)):
        rng = np.random.default_rng(count)
        (source / "images" / split).mkdir(parents=True)
        if split != "test":  # Which has no masks.
            (source / "masks" / split).mkdir(parents=True)
        for index in range(count):
            height, width = sizes_hw[index % len(sizes_hw)]
            labels = rng.integers(0, 3, (4, 4), np.uint8).repeat(16, axis=0).repeat(16, axis=1)[:height, :width].copy()
            image = np.clip(colours[labels] + rng.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
            labels[:2] = 255
            cv2.imwrite(str(source / "images" / split / f"room{index:02}.png"), image[..., ::-1])
            if split != "test":
                cv2.imwrite(str(source / "masks" / split / f"room{index:02}.png"), labels)
    (source / "classes.txt").write_text("wall #c83c3c\nfloor #3cc83c\nlamp #3c3cc8\n")


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> Path:
    """The folder of a prepared data set `rooms`: 27 images to train on, 11 to score, and 2 in `test` without labels."""
    folder = tmp_path_factory.mktemp("rooms")
    write_rooms(folder / "source")
    prepare("folder", str(folder / "source"), str(folder / "datasets"), name="rooms")
    return folder / "datasets"


class TinyBackbone(nn.Module):
    """In the place of a ResNet, where its size does not matter: a stem and a layer a stage, at the same strides."""

    stem: str = "v1"
    output_stride: int = 16
    multi_grid: tuple[int, ...] = ()
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, extent=None, *, train):
        """[B, H, W, 3] -> features of stages 2 to 5."""
        features = {}
        x = max_pool(ConvNormRelu(4, 7, 2, dtype=self.dtype, name="stem")(x, extent, train=train), extent)
        for stage, width, stride in ((2, 4, 1), (3, 6, 2), (4, 8, 2)):
            layer = ConvNormRelu(width, 3, stride, dtype=self.dtype, name=f"stage{stage}")
            x = features[stage] = layer(x, extent, train=train)
        features[5] = BasicBlock(10, 1, (1, 2), dtype=self.dtype, name="stage5_block0")(x, extent, train=train)
        return features


class FourConvolutions(nn.Module):
    """In the place of a ResNet, at the strides of one, where its layers do not matter: quick to compile."""

    stem: str = "v1"
    output_stride: int = 16
    multi_grid: tuple[int, ...] = ()
    remat: str = "none"
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, extent=None, *, train):
        """[B, H, W, 3] -> features of stages 2 to 5."""
        features = {}
        for stage, stride in ((2, 4), (3, 2), (4, 2), (5, 1)):
            x = features[stage] = nn.relu(Conv(8, 3, stride, dtype=self.dtype, name=f"stage{stage}")(x, extent))
        return features


@pytest.fixture(scope="session")
def four_convolutions() -> type[nn.Module]:
    """`FourConvolutions`, for tests of what is behind a backbone."""
    return FourConvolutions


def _step_of(config: ConfigDict, model: nn.Module, steps: int) -> tuple:
    """`program.step_of`, the same functions for configs that differ in what it does not read."""
    config, default = from_json(to_json(config), "config").unlock(), default_config()
    config.init_from = ""
    for field in ("root", "read_threads", "cache_decoded_gb"):
        config.data[field] = default.data[field]
    for field in ("log_every_steps", "checkpoint_every_steps", "evaluate_every_epochs"):
        config.training[field] = default.training[field]
    return _remembered_step_of(to_json(config), model, steps)


@cache
def _remembered_step_of(config: str, model: nn.Module, steps: int) -> tuple:
    return program.step_of(from_json(config, "config"), model, steps)


@pytest.fixture
def files_of_at_most() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Called with a size in bytes, gives a context in which what is written beyond fails, as on a full disk."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def small_config_for(rooms) -> Callable[[pytest.MonkeyPatch], ConfigDict]:
    """Called with what puts things back at the end, gives `small_config`: for fixtures of a wider scope."""

    def make(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
        monkeypatch.setitem(RESNETS, "resnet18", FourConvolutions)
        # One function for all runs of a config, so that JAX traces it once: most of the time of a run of six steps.
        monkeypatch.setattr(loop, "step_of", _step_of)
        config = default_config()
        config.data.update(name="rooms", root=str(rooms), crop_size_hw=(32, 32), batch_size=8, read_threads=2)
        config.model.update(backbone="resnet18", width=8, deep_supervision=False)
        config.optimizer.base_lr = 0.1
        config.training.update(epochs=2, log_every_steps=1, checkpoint_every_steps=2, evaluate_every_epochs=1)
        return config

    return make


@pytest.fixture
def small_config(small_config_for, monkeypatch) -> ConfigDict:
    """Six steps of eight crops of 32x32 from `rooms`, for a DSNet whose "resnet18" is `FourConvolutions`."""
    return small_config_for(monkeypatch)


@pytest.fixture(scope="session")
def tiny_backbone() -> type[nn.Module]:
    """`TinyBackbone`, for tests that build their network themselves."""
    return TinyBackbone


@pytest.fixture
def random_run(small_config, rooms, random_variables, tmp_path, monkeypatch) -> Path:
    """A workdir as training leaves it, with random weights as those of step 7 and mIoU 0.5.

    Of `small_config`, with a `TinyBackbone` for "resnet18". Of the seed it matters that all three classes are
    predicted.
    """
    monkeypatch.setitem(RESNETS, "resnet18", TinyBackbone)
    spec = open_split(str(rooms), "rooms", "val").spec
    network = build_model(small_config.model, spec.num_classes)
    variables = random_variables(network, np.zeros((1, 64, 64, 3), np.float32), train=False, seed=7)
    with locked_workdir(tmp_path / "run"):
        claim_workdir(tmp_path / "run", small_config, spec)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(7, {"variables": jax.device_put(variables)}, {})
    checkpoints.record_score(7, 0.5)
    checkpoints.close()
    return tmp_path / "run"
