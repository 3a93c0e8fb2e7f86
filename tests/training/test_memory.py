"""Out of memory: one line with the compiler's figure and the fields that would lower it."""

import jax
import jax.numpy as jnp
import pytest

from dsnet_jax.config import default_config
from dsnet_jax.errors import InputError
from dsnet_jax.training.memory import advice_for_evaluation, advice_for_step, out_of_memory_explained

TPU = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 17.54G of 15.75G hbm. Exceeded hbm capacity by 1.79G.

Total hbm usage >= 18.05G:
    reserved        530.00M
"""
GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.43GiB. [tf-allocator-allocation-error='']"


def test_memory_that_the_machine_does_not_have_is_one_line_with_figure_and_remedies():
    config = default_config()
    with pytest.raises(InputError) as raised, out_of_memory_explained(advice_for_step(config, 8)):
        jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 45,)) + 1)())
    message = str(raised.value)
    assert message.startswith("out of memory: ") and "140737488355" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error, figure",
    [
        (TPU, "Used 17.54G of 15.75G hbm. Exceeded hbm capacity by 1.79G"),
        (GPU, "Out of memory while trying to allocate 12.43GiB"),
        ("RESOURCE_EXHAUSTED: something new", "RESOURCE_EXHAUSTED: something new"),
    ],
)
def test_the_compilers_figure_is_told_and_each_field_with_its_value(error, figure):
    config = default_config()
    config.training.accumulation_steps = 2
    with pytest.raises(InputError) as raised, out_of_memory_explained(advice_for_step(config, 4)):
        raise jax.errors.JaxRuntimeError(error)
    assert str(raised.value) == (
        f"out of memory: {figure}: what helps is config.training.remat=blocks, in another --workdir fewer images at a "
        "time (4 a device now: a smaller config.data.batch_size, or a larger config.training.accumulation_steps, 2 "
        "now), smaller crops (config.data.crop_size_hw, 512x512 now), config.model.dtype=bfloat16"
    )


def test_what_a_run_has_already_is_not_recommended():
    config = default_config()
    config.model.dtype, config.training.remat = "bfloat16", "blocks"
    assert not any("bfloat16" in advice or "remat" in advice for advice in advice_for_step(config, 1))
    assert not any("bfloat16" in advice for advice in advice_for_evaluation(config, 1))


def test_an_evaluation_is_advised_on_its_own_batch():
    config = default_config()
    config.evaluation.batch_size = 6
    elsewhere = "in another --workdir config.model.dtype=bfloat16"
    assert advice_for_evaluation(config, 4) == [
        "fewer images at a time (config.evaluation.batch_size, 6 now)",
        elsewhere,
    ]
    assert advice_for_evaluation(config, 8) == [elsewhere]  # Six are eight there.


def test_other_errors_stay_as_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory_explained([]):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
