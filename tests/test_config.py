"""The config: unknown fields and wrong values are told in one line, and what is written is read back."""

from pathlib import Path

import pytest

from dsnet_jax.config import LIMITS, default_config, differences, from_json, load_config, to_json
from dsnet_jax.errors import InputError

QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'shapes_quickstart.py'}"
START = "from dsnet_jax.config import default_config\ndef get_config():\n    config = default_config()\n"


def error_of(*arguments):
    with pytest.raises(InputError) as raised:
        load_config(list(arguments))
    message = str(raised.value)
    assert raised.value.exit_code == 2
    assert "\n" not in message and "Traceback" not in message
    return message


def config_file(tmp_path, text):
    (tmp_path / "experiment.py").write_text(text)
    return f"--config={tmp_path / 'experiment.py'}"


def test_a_config_file_changes_the_default_and_the_command_line_changes_the_file():
    config = load_config([QUICKSTART, "--config.optimizer.base_lr=0.5", "--config.data.crop_size_hw=(64,96)"])
    assert config.model.backbone == "resnet18"  # The file's, not the default's.
    assert config.optimizer.base_lr == 0.5
    assert config.data.crop_size_hw == (64, 96)
    assert differences(default_config(), load_config([QUICKSTART])) != {}


def test_the_flag_and_its_file_may_be_two_words():
    assert load_config(QUICKSTART.split("=")) == load_config([QUICKSTART])


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.model.widht=3", "unknown field 'widht', did you mean 'width'?"),
        ("--config.modle.width=3", "unknown field 'modle', did you mean 'model'?"),
        ("--config.model.zzzzzz=3", "unknown field 'zzzzzz'"),
        ("--config.model.width=wide", "--config.model.width=wide"),
        ("--config.model.width=1.5", "--config.model.width=1.5"),
        ("--config.model.deep_supervision=maybe", "maybe"),
        ("--cofnig=x", "cofnig"),
        ("model.width=3", "fields are set as --config.field=value"),
    ],
)
def test_what_the_command_line_cannot_set_is_told_in_one_line(override, message):
    assert message in error_of(QUICKSTART, override)


@pytest.mark.parametrize(
    "body, message",
    [
        ("    config.model.widht = 3\n    return config", "unknown field 'widht', did you mean 'width'?"),
        (
            "    config.model.width = 'wide'\n    return config",
            "experiment.py: TypeError: Could not override field 'width'",
        ),
        ("    return confg", "name 'confg' is not defined"),
        ("    return config.to_dict()", "lock"),
        ("    del config", "--config is missing"),
        ("    return config config", "invalid syntax"),
        ("    import nowhere", "No module named 'nowhere'"),
        ("    return [config][1]", "config: the file raises IndexError: list index out of range (--debug shows where)"),
        ("    assert config is None", "config: the file raises AssertionError (--debug"),
        ("    config.seed = 1 // 0", "config: the file raises ZeroDivisionError: integer division or modulo by zero"),
        (
            "    from ml_collections import ConfigDict\n    return ConfigDict({'seed': 1})",
            "start from default_config()",
        ),
    ],
)
def test_what_is_wrong_in_a_config_file_is_told_in_one_line(tmp_path, body, message):
    assert message in error_of(config_file(tmp_path, START + body))


@pytest.mark.parametrize("arguments", [("--config=nowhere.py",), ("--config", "nowhere.py")])
def test_a_missing_config_file_is_named(arguments):
    message = error_of(*arguments)
    assert "'nowhere.py'" in message and "configs/" in message


def test_no_config_file_at_all_is_told():
    assert "--config is missing" in error_of()


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.log_every_steps=0", "1 to "),
        ("training.epochs=0", "1 to "),
        ("optimizer.base_lr=nan", "0 to "),
        ("optimizer.momentum=-0.1", "0 to 1"),
        ("data.flip_probability=1.5", "0 to 1"),
        ("data.image_scale=0", "0.01 to "),
        ("seed=-1", "0 to 4294967295"),
        ("data.crop_size_hw=64", "height and width"),
        ("data.crop_size_hw=(64,64,3)", "height and width"),
        ("data.crop_size_hw=(64.5,64)", "height and width"),
        ("data.crop_size_hw=(0,64)", "1 to "),
        ("data.scale_range=(2.0,0.5)", "the least and the largest"),
        ("data.scale_range=(0.0,0.5)", "0.01 to "),
        ("data.scale_box=(512,2048)", "the long and the short edge"),
        ("data.scale_box=(512,512,512)", "the long and the short edge"),
        ("evaluation.slide_crop_hw=(96,)", "height and width are needed"),
        ("evaluation.slide_stride_hw=(96,96.5)", "in whole pixels"),
        ("model.output_stride=0", "one of 8, 16, 32 is needed"),
        ("model.output_stride=12", "one of 8, 16, 32 is needed"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field(override, message):
    field = override.split("=")[0]
    found = error_of(QUICKSTART, f"--config.{override}")
    assert f"config.{field} is " in found and message in found


def test_no_scale_at_all_is_refused():
    assert "config.evaluation.scales is empty" in error_of(QUICKSTART, "--config.evaluation.scales=()")


def test_a_tuple_is_given_once_and_of_other_fields_the_last_value_counts():
    rates = "--config.model.atrous_rates=6,12"
    assert "--config.model.atrous_rates is given twice" in error_of(QUICKSTART, rates, "-config.model.atrous_rates=3,6")
    assert load_config([QUICKSTART, rates, "--config.seed=1", "--config.seed=2"]).seed == 2


def test_a_box_and_a_working_resolution_together_are_refused():
    message = error_of(QUICKSTART, "--config.data.scale_box=(520,520)", "--config.data.image_scale=0.5")
    assert "scale_box is (520, 520)" in message and "image_scale is 0.5" in message


def test_every_limit_is_of_a_field_and_holds_for_its_default():
    config = default_config()
    for field, (least, largest) in LIMITS.items():
        value = config
        for name in field.split("."):
            value = value[name]
        assert all(least <= number <= largest for number in (value if isinstance(value, tuple) else (value,))), field


def test_json_and_back_keeps_every_field_and_its_type():
    config = load_config([QUICKSTART, "--config.model.multi_grid=(1,2)", "--config.training.epochs=3"])
    again = from_json(to_json(config), "config.json")
    assert again == config
    assert isinstance(again.data.crop_size_hw, tuple) and again.model.multi_grid == (1, 2)
    assert again.is_locked


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"sede": 1}', "unknown field 'sede', did you mean 'seed'?"),
        ('{"model": {"width": "wide"}}', "'width'"),
        ('{"model": 3}', "items"),
        ('{"model":', "line 1"),
    ],
)
def test_json_that_is_no_config_is_refused_with_its_file(text, message):
    with pytest.raises(InputError) as raised:
        from_json(text, "runs/a/config.json")
    assert str(raised.value).startswith("runs/a/config.json: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_differences_name_each_field_with_both_values():
    old, new = default_config(), default_config()
    new.model.width, new.data.crop_size_hw = 128, (64, 64)
    assert differences(old, new) == {
        "data.crop_size_hw": "data.crop_size_hw: (512, 512) -> (64, 64)",
        "model.width": "model.width: 256 -> 128",
    }
    assert differences(old, default_config()) == {}
