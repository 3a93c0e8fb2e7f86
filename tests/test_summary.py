"""Parameters and multiply-adds, against published figures and against sums written out."""

import pytest
from flax import linen as nn

from dsnet_jax.config import default_config
from dsnet_jax.data.specs import SHAPES
from dsnet_jax.errors import InputError
from dsnet_jax.models.cgds import CGDS
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.models.layers import Conv
from dsnet_jax.models.resnet import RESNETS, BasicBlock, ResNet
from dsnet_jax.summary import parts_of, print_summary


@pytest.mark.parametrize(
    "name, parameters, gmac",
    [
        ("resnet18", 11_689_512, 1.814),
        ("resnet50", 25_557_032, 4.089),
        ("resnet101", 44_549_160, 7.801),
    ],
)
def test_figures_of_resnets_are_those_that_torchvision_publishes(name, parameters, gmac):
    """Its figures are for 224x224 and have the classifier of ImageNet, which the backbone has not."""
    parts = parts_of(RESNETS[name](output_stride=32), (224, 224))
    channels = 512 if name == "resnet18" else 2048
    assert sum(part.parameters for part in parts) == parameters - 1000 * (channels + 1)
    assert round((sum(part.multiply_adds for part in parts) + 1000 * channels) / 1e9, 3) == gmac


CLASSES, WIDTH = 5, 16
LOW, HIGH = 8 * 12, 4 * 6  # Cells at strides 8 and 16 of an image of 64x96.


@pytest.fixture(scope="module")
def parts():
    network = DSNet(ResNet((1, 1, 1, 1), BasicBlock), CLASSES, width=WIDTH, atrous_rates=(1, 2))
    return {part.name: part for part in parts_of(network, (64, 96), train=True)}


def test_the_parts_stand_in_the_order_of_computation(parts):
    assert list(parts) == ["backbone", "aspp", "cgds", "auxiliary", "classifier"]


def test_multiply_adds_are_those_of_the_convolutions_summed_by_hand(parts):
    stem = 32 * 48 * 7 * 7 * 3 * 64
    stage2 = 16 * 24 * 9 * (64 * 64 + 64 * 64)
    stage3 = LOW * (9 * (64 * 128 + 128 * 128) + 64 * 128)
    stage4 = HIGH * (9 * (128 * 256 + 256 * 256) + 128 * 256)
    stage5 = HIGH * (9 * (256 * 512 + 512 * 512) + 256 * 512)
    assert parts["backbone"].multiply_adds == stem + stage2 + stage3 + stage4 + stage5
    pooled_branch, other_branches, projection = 512 * WIDTH, HIGH * (1 + 9 + 9) * 512 * WIDTH, HIGH * 4 * WIDTH * WIDTH
    assert parts["aspp"].multiply_adds == pooled_branch + other_branches + projection
    assert parts["classifier"].multiply_adds == LOW * (9 * 3 * WIDTH * WIDTH + WIDTH * CLASSES)
    assert parts["auxiliary"].multiply_adds == HIGH * (9 * 256 * WIDTH + WIDTH * CLASSES)


def test_the_loop_over_the_sampled_points_is_counted_as_often_as_it_runs(parts):
    modification = LOW * 128 * WIDTH
    resizing = WIDTH * (8 * 4 * 6 + 8 * 6 * 12)  # Rows and then columns, as matrix products.
    offsets = LOW * 9 * WIDTH * 18
    sampling = 9 * LOW * WIDTH * WIDTH
    assert parts["cgds"].multiply_adds == modification + resizing + offsets + sampling


def test_parameters_are_those_of_every_part(parts):
    def block(before, after, shortcut=True):
        return 9 * (before * after + after * after) + 4 * after + shortcut * (before * after + 2 * after)

    stem = 7 * 7 * 3 * 64 + 2 * 64
    stages = block(64, 64, shortcut=False) + block(64, 128) + block(128, 256) + block(256, 512)
    assert parts["backbone"].parameters == stem + stages
    assert parts["aspp"].parameters == (1 + 9 + 9 + 1) * 512 * WIDTH + 4 * WIDTH * WIDTH + 5 * 2 * WIDTH
    cgds = 128 * WIDTH + 2 * WIDTH + 9 * WIDTH * 18 + 18 + 9 * WIDTH * WIDTH + 2 * WIDTH
    assert parts["cgds"].parameters == cgds
    assert parts["auxiliary"].parameters == 9 * 256 * WIDTH + 2 * WIDTH + WIDTH * CLASSES + CLASSES


def test_outside_training_there_is_no_deep_supervision():
    network = DSNet(ResNet((1, 1, 1, 1), BasicBlock), CLASSES, width=WIDTH)
    assert "auxiliary" not in [part.name for part in parts_of(network, (64, 96))]


class Twice(nn.Module):
    """A part that is called twice."""

    @nn.compact
    def __call__(self, x, *, train):
        conv = Conv(3, 3, name="shared")
        return conv(conv(x))


def test_a_part_that_is_used_twice_counts_twice_and_its_parameters_once():
    (part,) = parts_of(Twice(), (5, 4))
    assert (part.name, part.parameters, part.multiply_adds) == ("shared", 81, 2 * 20 * 81)


def test_a_larger_kernel_of_sampled_points_makes_the_loop_longer():

    class Sampler(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return CGDS(4, sampling_kernel=5, name="cgds")(x, x, train=train).sampled

    (part,) = parts_of(Sampler(), (6, 6))
    assert part.multiply_adds == 36 * (3 * 4 + 9 * 3 * 50 + 25 * 4 * 4)


def summary_of(capsys, classes=None, **model):
    config = default_config()
    config.data.crop_size_hw = (64, 96)
    config.model.update({"backbone": "resnet18", "width": 16} | model)
    print_summary(config, classes)
    return capsys.readouterr().out


def test_the_table_says_parameters_work_and_shapes(capsys):
    printed = summary_of(capsys)
    parts = [row for row in printed.splitlines() if "│" in row]
    assert [row.split()[1] for row in parts] == ["backbone", "aspp", "cgds", "auxiliary", "classifier", "together"]
    assert parts[0].split()[3] == "11.18"
    assert f"image 1 x 64 x 96 x 3, {SHAPES.num_classes} classes" in printed
    assert "logits 1 x 8 x 12 x 5\n" in printed
    assert "offsets 1 x 8 x 12 x 9 x 2\n" in printed


def test_a_network_without_offsets_has_none_in_the_table(capsys):
    assert "offsets" not in summary_of(capsys, name="fcn")


def test_the_number_of_classes_can_be_given(capsys):
    assert "logits 1 x 8 x 12 x 31\n" in summary_of(capsys, classes=31)


def test_the_classes_of_a_prepared_data_set_are_used(capsys, small_config):
    print_summary(small_config)
    assert "image 1 x 32 x 32 x 3, 3 classes" in capsys.readouterr().out


def test_a_data_set_that_is_not_prepared_is_told_and_how_to_go_on(tmp_path):
    config = default_config()
    config.data.name, config.data.root = "streets", str(tmp_path)
    with pytest.raises(InputError, match=r"'streets' is not prepared.*or give --classes"):
        print_summary(config)


@pytest.mark.parametrize("classes", [0, 256])
def test_more_classes_than_labels_and_none_at_all_are_refused(classes):
    with pytest.raises(InputError, match=f"--classes is {classes}: 1 to 255 are needed"):
        print_summary(default_config(), classes)
