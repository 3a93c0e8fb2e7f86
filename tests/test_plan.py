"""The plan of a small network for this process's eight devices, and what is read of the text of a compiler."""

import contextlib
import math
import os
import re
import signal
from types import SimpleNamespace

import jax
import pytest

from dsnet_jax import parallel, plan
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.plan.programs import (
    Compiled,
    TooLarge,
    collectives_in,
    compile_for,
    lower_evaluation,
    lower_training,
    most_images,
)
from dsnet_jax.plan.search import Largest, largest_batch
from dsnet_jax.plan.targets import COMPILER_OPTIONS, TARGETS, Target, find_target, mesh_of
from dsnet_jax.stopping import SIGNALS
from dsnet_jax.summary import parts_of
from dsnet_jax.training.program import check_shares, step_of

# Of programs compiled for a TPU v5e, an H100 and a CPU.
TEXT = """
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0:T(128)}}
  %all-reduce.3 = (f32[64]{0:T(128)S(1)}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  ROOT %x.1 = f32[]{:T(128)} all-reduce(%fusion.1), channel_id=2, metadata={op_name="jit(f)/all-gather(x)"}
  all-reduce-start.1 = f32[10]{0} all-reduce-start(c), channel_id=3
  all-reduce-done.1 = f32[10]{0} all-reduce-done(all-reduce-start.1)
  %ag = (f32[1,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%d), dimensions={0}
  %agd = f32[8,4]{1,0} all-gather-done(%ag)
  %ags = ((f32[2]{0}, pred[3]{0}), (f32[16]{0}, pred[24]{0})) all-gather-start(%d, %e), dimensions={0}
  %cp = (u8[5]{0}, u8[5]{0}, u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1}}
  %rs = f8e4m3fn[7]{0} reduce-scatter(%g), dimensions={0}
  %fusion.9 = f32[9]{0} fusion(%all-reduce.3), kind=kLoop, calls=%all-to-all_fusion
"""


def test_collectives_are_counted_by_kind_with_the_bytes_of_their_results():
    assert collectives_in(TEXT) == {
        "all-reduce": (3, 64 * 4 + 6 * 2 + 4 + 40),
        "all-gather": (2, 8 * 4 * 4 + 16 * 4 + 24),
        "collective-permute": (1, 5),
        "reduce-scatter": (1, 7),
    }


def test_a_program_without_collectives_has_none():
    assert collectives_in("  %fusion.9 = f32[9]{0} fusion(%all-reduce.3), kind=kLoop, calls=%all-to-all_fusion") == {}


@pytest.fixture
def mesh():
    return mesh_of(TARGETS["cpu"])


@pytest.fixture
def config(small_config):
    small_config.data.batch_size = 16
    return small_config


def test_the_train_step_of_eight_devices_only_reduces_and_its_memory_is_told(config, mesh):
    found = compile_for("cpu", lower_training(config, build_model(config.model, 3), mesh))
    assert set(found.collectives) == {"all-reduce"}
    state = jax.eval_shape(step_of(config, build_model(config.model, 3), 1)[0])
    state_size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # Two crops of 32x32 with labels, and whether this device was told to stop.
    assert found.arguments == state_size + 2 * 32 * 32 * 4 + 4
    assert found.aliased == state_size  # The old state's memory is the new one's.
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.variables["params"]))
    # Taps that lie outside of these 2x2 cells have no gradient, and what is in a loop counts once.
    assert found.collectives["all-reduce"][1] >= 0.75 * gradients
    assert found.temporaries > 0 and found.accessed > found.arguments
    assert found.memory == found.arguments + found.outputs - found.aliased + found.temporaries + found.code


def test_the_evaluation_of_a_device_needs_no_other(config, mesh):
    found = compile_for("cpu", lower_evaluation(config, build_model(config.model, 3), mesh))
    assert "all-gather" not in found.collectives
    assert found.aliased == 0


def test_what_the_compiler_says_of_too_large_a_program_is_read():
    class Refused:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded hbm "
                "capacity by 2.75G."
            )

    assert compile_for("tpu", Refused()) == TooLarge(18.5 * 2**30)


def test_other_errors_of_the_compiler_are_not_hidden():
    class Fails:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        compile_for("tpu", Fails())


def test_an_unknown_target_is_refused_and_the_known_ones_are_named():
    with pytest.raises(InputError, match=r"'v9'.*v5e:2x4.*tpu7x:2x2x1.*h100:8, cpu") as error:
        find_target("v9")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize("name, extra", [("v5e:2x4", "tpu"), ("h100:8", "cuda")])
def test_a_compiler_that_is_not_installed_is_told_in_one_line_with_the_extra(monkeypatch, name, extra):
    def refuse(*arguments, **options):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.\nSee elsewhere")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    for variable in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "XLA_FLAGS"):
        monkeypatch.setenv(variable, "")  # What is set for the compilers is put back.
    with pytest.raises(InputError, match=rf"'\.\[{extra}\]'") as error:
        mesh_of(TARGETS[name])
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_a_libtpu_in_use_is_not_called_missing(monkeypatch):
    def refuse(*arguments, **options):
        raise jax.errors.JaxRuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(InputError, match="in use by another process") as error:
        mesh_of(TARGETS["v5e:2x4"])
    assert "install" not in str(error.value)


def test_every_target_but_the_cpu_has_its_memory_and_peaks():
    for name, target in TARGETS.items():
        assert all([target.memory, target.flops, target.bandwidth]) == (name != "cpu")
        # Of no accelerator does a byte cost less than 100 operations or more than 1000.
        assert name == "cpu" or 100 < target.flops / target.bandwidth < 1000


def search(line, first, limit=16000, state=None, **options):
    """What is found where a batch needs `line(batch)`, and which batches were measured after `first`."""
    asked = []

    def measure(batch):
        asked.append(batch)
        return line(batch), line(batch) <= limit

    tried = {first: (line(first), line(first) <= limit)} | ({} if state is None else {0: (state, True)})
    return largest_batch(measure, limit, tried, **options), asked


def test_where_memory_grows_by_a_line_one_more_compilation_leads_to_the_largest_batch():
    assert search(lambda batch: 500 + 300 * batch, first=4, state=500) == (Largest(51, None, 51), [51])


def test_where_memory_grows_faster_the_answer_is_still_measured_and_the_largest():
    found, asked = search(lambda batch: 500 + 300 * batch + 4 * batch**2, first=4, state=500, compilations=9)
    assert found.fits == found.expected == 35 and 35 in asked
    assert len(asked) <= 5


def test_a_first_batch_that_does_not_fit_is_lowered():
    found, asked = search(lambda batch: 500 + 300 * batch, first=100)
    assert found == Largest(51, 100, 51) and asked == [50, 51]


def test_where_the_compiler_does_not_say_how_much_is_missing_batches_are_halved():
    found, _ = search(lambda batch: 100 * batch if batch <= 5 else math.inf, first=40, compilations=9)
    assert (found.fits, found.too_large) == (5, 6)


def test_none_fits_only_if_the_least_was_measured():
    found, asked = search(lambda batch: 20000 + batch, first=8, unit=2)
    assert (found.fits, found.too_large, asked) == (0, 2, [4, 2])


def test_a_search_that_ends_early_says_what_it_would_have_tried():
    found, asked = search(lambda batch: batch**3, first=4, unit=4, compilations=3)
    assert len(asked) == 3 and not any(batch % 4 for batch in asked)
    assert found.fits in (4, *asked) and found.fits**3 <= 16000
    assert found.fits < found.expected and found.expected % 4 == 0


@pytest.fixture
def compiled_by_a_formula(monkeypatch):
    """In the place of compiling: 0.5 GB, and 0.3 GB an image of a device."""

    def compile_for(platform, lowered):
        (_, batch), _ = lowered.args_info
        images = batch["image"].shape[0] // 8
        return Compiled(
            400_000_000, 400_000_000, 399_000_000, 300_000_000 * images, 99_000_000, 2e9, {"all-reduce": (5, 7_000_000)}
        )

    monkeypatch.setattr(plan, "compile_for", compile_for)


def test_the_printed_plan_has_every_figure(config, capsys, monkeypatch, compiled_by_a_formula):
    monkeypatch.setitem(TARGETS, "board", Target("cpu", memory=4e9, flops=1e12, bandwidth=1e11, usable=0.75))
    plan.plan(config, "board", num_classes=3)
    lines = [re.sub(r"in [\d:]+: ", "in T: ", line) for line in capsys.readouterr().out.splitlines()]
    model = build_model(config.model, 3)
    multiply_adds = sum(part.multiply_adds for part in parts_of(model, (32, 32), train=True))
    rate = 8e12 / (6 * multiply_adds)
    beside = "outputs 0.40 of which 0.00 beside the arguments, code 0.10): fits into 4.0 GB of which JAX takes 75%"
    assert lines == [
        "training of dsnet, resnet18, 3 classes, 32x32, float32, on board: 8 devices, 2 images each",
        "parameters: 0.0 M",
        f"FLOPs an image: {6 * multiply_adds / 1e9:,.0f} G, of convolutions and matrix products, three times the pass "
        "forward",
        f"2 images a device, compiled in T: 1.10 GB a device (arguments 0.40, temporaries 0.60, {beside}",
        "all-reduce: 5 in the program, 7.0 MB",
        f"ceiling by arithmetic: {rate:,.0f} images/s, at 1 TFLOP/s a device",
        "ceiling by memory: 800 images/s, at 100 GB/s and 2.0 GB a step and device, loops counted once",
        "the largest batch: at most four more are compiled",
        f"8 images a device, compiled in T: 2.90 GB a device (arguments 0.40, temporaries 2.40, {beside}",
        "largest batch: 8 images a device, 64 a step; 9 would not fit, by how memory grew",
    ]


def test_a_ceiling_that_a_compiler_does_not_tell_is_said_to_be_unknown(config, capsys, monkeypatch):
    found = Compiled(0, 0, 0, 2_000_000_000, 0, None, {})
    monkeypatch.setitem(TARGETS, "board", Target("cpu", memory=4e9, flops=1e12, bandwidth=1e11, usable=0.75))
    monkeypatch.setattr(plan, "compile_for", lambda platform, lowered: found)
    plan.plan(config, "board", num_classes=3)
    assert "ceiling by memory: not known, this compiler does not say" in capsys.readouterr().out


def test_a_compiler_at_work_is_ended_by_a_signal(config, monkeypatch, compiled_by_a_formula):
    handlers, compile_for = [], plan.compile_for

    def noted(*arguments):
        handlers.append([signal.getsignal(number) for number in SIGNALS])
        return compile_for(*arguments)

    monkeypatch.setattr(plan, "compile_for", noted)
    plan.plan(config, "cpu", num_classes=3)
    assert handlers == [[signal.SIG_DFL] * len(SIGNALS)]


def test_evaluation_is_planned_for_the_batch_that_is_evaluated(config, capsys):
    config.evaluation.batch_size = 20
    plan.plan(config, "cpu", evaluation=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("evaluation of dsnet") and lines[0].endswith("8 devices, 3 images each")
    assert lines[2].endswith("one pass forward")
    assert not any("largest" in line for line in lines)  # Of this machine nobody knows what else it is used for.


@pytest.mark.parametrize(
    "batch_size, per_device, parts, message",
    [
        (12, None, 1, "config.data.batch_size is 12, which 8 devices cannot share equally: choose a multiple of 8"),
        (16, 0, 1, "--batch-per-device is 0: 1 or more is needed"),
        (16, 3, 2, "config.data.batch_size is 24, which 8 devices cannot share equally in 2 parts each"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(config, batch_size, per_device, parts, message):
    config.data.batch_size, config.training.accumulation_steps = batch_size, parts
    with pytest.raises(InputError, match=message) as error:
        plan.plan(config, "cpu", per_device)
    assert error.value.exit_code == 2


def test_a_plan_refuses_a_single_image_at_a_time_as_training_does(config):
    config.data.batch_size, config.training.accumulation_steps = 4, 4
    with pytest.raises(InputError, match=r"batch_size is 4 and .* 4, which leaves a single image at a time") as error:
        check_shares(config, devices=1)
    assert error.value.exit_code == 2


def test_no_image_a_device_is_refused_for_an_evaluation_too(config):
    with pytest.raises(InputError, match=r"^--batch-per-device is 0: 1 or more is needed$"):
        plan.plan(config, "cpu", 0, evaluation=True)


def test_an_evaluation_of_more_pixels_than_it_counts_is_refused(config, mesh):
    most = (2**31 - 1) // (8 * 32 * 32)
    assert most_images(config, 8) == most
    message = (
        f"^{most + 1} images of 32x32 on each of 8 devices have more pixels than an evaluation counts at a time: give "
        f"--batch-per-device={most} or less$"
    )
    with pytest.raises(InputError, match=message) as error:
        plan.plan(config, "cpu", most + 1, evaluation=True)
    assert error.value.exit_code == 2
    for batch, fits in ((most, True), (most + 1, False)):
        config.evaluation.batch_size = 8 * batch
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="can overflow int32"):
            lower_evaluation(config, build_model(config.model, 3), mesh)


def test_a_batch_that_an_evaluation_cannot_count_is_too_large_for_the_search(config, capsys, monkeypatch):
    monkeypatch.setitem(TARGETS, "board", Target("cpu", memory=1e12))
    lowered = []

    def lower(config, model, mesh):
        lowered.append(config.evaluation.batch_size // 8)

    monkeypatch.setattr(plan, "lower_evaluation", lower)
    monkeypatch.setattr(plan, "compile_for", lambda *_: Compiled(1000, 0, 0, 1000 * lowered[-1], 0, None, {}))
    most = most_images(config, 8)
    plan.plan(config, "board", most - 1, evaluation=True, num_classes=3)
    assert lowered == [most - 1, most]
    told = f"largest batch: {most} images a device, {8 * most} a step; {most + 1} do not fit"
    assert told in capsys.readouterr().out


def test_a_search_that_found_no_batch_that_fits_says_so(config, capsys, monkeypatch):
    monkeypatch.setitem(TARGETS, "board", Target("cpu", memory=1.0))
    monkeypatch.setattr(plan, "lower_training", lambda *_: None)
    monkeypatch.setattr(plan, "compile_for", lambda *_: TooLarge(None))
    plan.plan(config, "board", 1000, num_classes=3)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "largest batch: not found, less than 62: give a smaller --batch-per-device"


def test_an_evaluation_is_planned_on_the_canvas_that_it_is_computed_on(config, mesh):
    config.data.crop_size_hw = (544, 513)  # The fixed list of canvases goes from 512 to 576.
    (_, images, *_), _ = lower_evaluation(config, build_model(config.model, 3), mesh).args_info
    assert images.shape == (8, 544, 544, 3)


def test_what_only_a_plan_is_compiled_with_is_said(config, capsys, monkeypatch, compiled_by_a_formula):
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", {"xla_some_option": False})
    plan.plan(config, "cpu", num_classes=3)
    assert "compiled with xla_some_option=False, which is needed where no such device is" in capsys.readouterr().out


def test_a_plan_for_gpus_is_compiled_with_the_flag_of_a_run(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("jaxlib.__version__", "0.10.2")
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda **_: SimpleNamespace(devices=[]))
    monkeypatch.setattr(parallel, "mesh_over", lambda devices: devices)
    mesh_of(TARGETS["h100:8"])
    assert os.environ["XLA_FLAGS"] == "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"


def test_the_mesh_of_the_cpu_is_that_of_training(mesh):
    assert mesh == parallel.global_mesh()


def test_what_fits_is_judged_by_the_share_that_jax_takes():
    found = Compiled(70, 0, 0, 0, 0, None, {})
    assert plan._measured(Target("cuda", memory=100, usable=0.75), found) == (70, True)
    assert plan._measured(Target("cuda", memory=100, usable=0.65), found) == (70, False)
