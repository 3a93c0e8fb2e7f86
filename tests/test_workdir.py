"""The folder of a run: what it remembers, refuses and keeps out."""

import dataclasses
import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest
from etils import epath

from dsnet_jax.config import FREE_FIELDS, default_config
from dsnet_jax.data.specs import CAMVID, SHAPES
from dsnet_jax.errors import InputError
from dsnet_jax.workdir import check_workdir, claim_workdir, locked_workdir, open_workdir
from dsnet_jax.writing import check_writable


def test_a_workdir_remembers_its_config_and_classes(tmp_path):
    config = default_config()
    config.model.width = 64
    with locked_workdir(tmp_path / "runs" / "a"):
        assert claim_workdir(tmp_path / "runs" / "a", config, CAMVID) == []
    assert open_workdir(tmp_path / "runs" / "a") == (config, CAMVID)


def test_a_workdir_takes_its_own_config_again_and_refuses_another_naming_every_field(tmp_path):
    config = default_config()
    claim_workdir(tmp_path, config, SHAPES)
    claim_workdir(tmp_path, config, SHAPES)
    other = default_config()
    other.seed, other.data.crop_size_hw = 1, (64, 64)
    with pytest.raises(InputError) as raised:
        claim_workdir(tmp_path, other, SHAPES)
    assert str(raised.value).splitlines()[1:] == ["data.crop_size_hw: (512, 512) -> (64, 64)", "seed: 0 -> 1"]
    assert open_workdir(tmp_path)[0] == config


@pytest.mark.parametrize("change", [{"class_names": SHAPES.class_names[::-1]}, {"palette": SHAPES.palette[::-1]}])
def test_a_workdir_refuses_other_classes_and_other_colours(tmp_path, change):
    claim_workdir(tmp_path, default_config(), SHAPES)
    with pytest.raises(InputError, match="other classes or colours than shapes has now"):
        claim_workdir(tmp_path, default_config(), dataclasses.replace(SHAPES, **change))


def test_a_folder_that_cannot_be_locked_is_told_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level("WARNING", "absl"), locked_workdir(tmp_path):
        claim_workdir(tmp_path, default_config(), SHAPES)
    assert "cannot be locked (No locks available): nothing keeps two runs apart" in caplog.text


def test_the_lock_is_on_a_file_open_for_writing(tmp_path, monkeypatch):
    """As NFS needs it to ask the server for an exclusive lock."""
    locked = []
    monkeypatch.setattr(
        fcntl, "flock", lambda file, _: locked.append((os.fstat(file), fcntl.fcntl(file, fcntl.F_GETFL)))
    )
    with locked_workdir(tmp_path / "run"):
        ((status, flags),) = locked
    assert stat.S_ISREG(status.st_mode) and flags & os.O_ACCMODE == os.O_RDWR


def test_a_workdir_without_its_classes_is_an_error_in_one_line(tmp_path):
    claim_workdir(tmp_path, default_config(), SHAPES)
    (tmp_path / "dataset.json").write_text('{"name": "shapes"}')
    with pytest.raises(InputError, match=r"dataset\.json: damaged \(KeyError\('palette'\)\): copy it"):
        open_workdir(tmp_path)
    (tmp_path / "dataset.json").unlink()
    for use in open_workdir, lambda workdir: check_workdir(workdir, default_config(), SHAPES):
        with pytest.raises(InputError, match=r"dataset\.json is missing, which names the classes: copy it"):
            use(tmp_path)


def test_a_workdir_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written .*: give another --workdir"),
        locked_workdir(tmp_path / "file" / "run"),
    ):
        pass


def test_storage_whose_package_is_missing_is_an_error_in_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # An import raises.
    uses = (
        lambda workdir: locked_workdir(workdir).__enter__(),
        lambda workdir: check_workdir(workdir, default_config(), SHAPES),
        open_workdir,
        lambda workdir: check_writable(workdir, "give another --workdir"),
    )
    for use in uses:
        with pytest.raises(InputError, match=r"^gs://bucket/run cannot be reached .*gcsfs.*pip install -e '\.\[gcs\]'"):
            use("gs://bucket/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_without_permission_to_write_is_an_error_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"), locked_workdir(tmp_path):
        pass


def test_fields_that_do_not_change_what_is_trained_may_change_and_are_remembered(tmp_path):
    config = default_config()
    claim_workdir(tmp_path, config, SHAPES)
    config.data.read_threads, config.training.checkpoint_every_steps = 7, 9
    changed = ["data.read_threads: 0 -> 7", "training.checkpoint_every_steps: 500 -> 9"]
    assert sorted(claim_workdir(tmp_path, config, SHAPES)) == changed
    assert open_workdir(tmp_path)[0] == config


def test_free_fields_are_fields():
    config = default_config()
    for name in FREE_FIELDS:
        part, field = name.split(".")
        assert field in config[part]


LOCKING = """
import sys, time
from dsnet_jax.workdir import locked_workdir

with locked_workdir(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_gone_even_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", LOCKING, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(InputError, match="another run is writing to it"), locked_workdir(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked_workdir(tmp_path):
        pass


@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
def test_what_a_workdir_remembers_but_cannot_be_read_is_an_error_in_one_line(tmp_path, monkeypatch, name):
    claim_workdir(tmp_path, default_config(), SHAPES)
    uses = open_workdir, lambda workdir: check_workdir(workdir, default_config(), SHAPES)

    def refused(message):
        for use in uses:
            with pytest.raises(InputError, match=message) as error:
                use(tmp_path)
            assert "\n" not in str(error.value)

    text = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"\xff\xfe")
    refused(rf"{name}: damaged \('utf-8' codec .*\): copy it from where the run was made")
    (tmp_path / name).write_text("[" * 100_000)
    refused(rf"{name}: .*recursion")
    if name == "dataset.json":
        (tmp_path / name).write_text(json.dumps({**json.loads(text), "class_names": [1, 2]}))
        refused(rf"{name}: damaged")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(rf"{name}: cannot be read \(Is a directory\): give yourself the right to, or give another --workdir")
    (tmp_path / name).rmdir()
    (tmp_path / name).write_bytes(text)
    cls, read_text = type(epath.Path(tmp_path)), type(epath.Path(tmp_path)).read_text

    def somebody_elses(path):  # Root may read everything.
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read_text(path)

    monkeypatch.setattr(cls, "read_text", somebody_elses)
    refused(rf"{name}: cannot be read \(Permission denied\)")


def test_a_folder_without_a_run_is_refused_and_not_made(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_workdir(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_run_in_a_folder_that_may_not_be_entered_is_not_said_to_be_missing(tmp_path, monkeypatch):
    claim_workdir(tmp_path, default_config(), SHAPES)

    def refused(path, **arguments):  # Root may enter everything.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "stat", refused)
    for use in (open_workdir, lambda workdir: check_workdir(workdir, default_config(), SHAPES)):
        with pytest.raises(InputError, match=r"config\.json: cannot be read: Permission denied$"):
            use(tmp_path)


def test_a_config_with_a_field_that_this_version_does_not_know_is_named_with_its_file(tmp_path):
    claim_workdir(tmp_path, default_config(), SHAPES)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["model"]["attention_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"config\.json: unknown field 'attention_heads'"):
        open_workdir(tmp_path)
