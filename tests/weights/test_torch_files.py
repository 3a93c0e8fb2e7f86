"""Files of others: read without running anything, and refused in one line when they are not what they should be."""

import hashlib
import io
import os
import pickle
import struct
import sys
import zipfile
from importlib.metadata import PackageNotFoundError

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsnet_jax import cli
from dsnet_jax.errors import InputError
from dsnet_jax.weights import torch_files
from dsnet_jax.weights.torch_files import read_arrays, sha256_of


class Malicious:
    """Leaves a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def in_zip(*members, compression=zipfile.ZIP_STORED):
    """As torch.save lays it out: pickles by the names given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def legacy(*objects):
    """As torch.save did before version 1.6: pickles one after another."""
    return b"".join(pickle.dumps(content, protocol=2) for content in objects)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", ["zip", "legacy", "legacy, in the first pickle", "named safetensors"])
def test_a_malicious_pickle_is_refused_in_one_line_and_leaves_no_trace(layout, protocol, tmp_path, capsys):
    harm = {"conv1.weight": Malicious(tmp_path / "trace")}
    assert pickle.loads(pickle.dumps(harm, protocol)) and (tmp_path / "trace").exists()  # It would.
    (tmp_path / "trace").rmdir()
    data = pickle.dumps(harm, protocol)
    if layout == "zip":
        data = in_zip(("archive/data.pkl", data), ("archive/data/0", b"1234"))
    elif layout == "legacy":
        data = legacy(1, 1001, {}) + data + legacy([])
    file = tmp_path / ("x.safetensors" if layout == "named safetensors" else "x.pth")
    file.write_bytes(data)
    assert cli.main(["port", str(file), f"--workdir={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dsnet: {file}: ") and error.count("\n") == 1
    if layout != "named safetensors" and (protocol == 2 or layout == "zip"):
        assert "refused, nothing of it was run: it names" in error
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["posix system", "torch hub.load", "builtins eval", "torch._utils _rebuild_qtensor"])
def test_whatever_is_not_on_the_list_is_named(name, tmp_path):
    module, attribute = name.split()
    data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    (tmp_path / "x.pth").write_bytes(in_zip(("archive/data.pkl", data)))
    with pytest.raises(InputError, match=rf"refused, nothing of it was run: it names {module}\.{attribute}"):
        read_arrays(tmp_path / "x.pth")


def test_a_refused_file_does_not_get_as_far_as_pytorch(tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(torch_files.importlib.metadata, "version", missing)
    (tmp_path / "bad.pth").write_bytes(in_zip(("archive/data.pkl", b"\x80\x02cposix\nsystem\n.")))
    old = b"\x80\x02ctorch._utils\n_rebuild_tensor\n."  # As named before version 0.4.
    (tmp_path / "good.pth").write_bytes(in_zip(("archive/data.pkl", old)))
    with pytest.raises(InputError, match=r"posix\.system"):
        read_arrays(tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"pip install -e '\.\[port\]', or give a \.safetensors"):
        read_arrays(tmp_path / "good.pth")


@pytest.mark.parametrize(
    "torch, message",
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", r"imported \(libcudart.*\): mend it, or"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "was killed while it read it, for want of memory"),
        ("import os, sys\nload = lambda *_, **__: os.rmdir(sys.argv[2]) or {}", "No such file .*free space, or set"),
        (
            "def load(*_, **__): raise EOFError('out of input')",
            r"damaged .*\(out of input\): download it again",
        ),
        ("load = lambda *_, **__: [1]", "holds a list, not arrays by name: give a state dict"),
    ],
    ids=["import", "killed", "no room", "damaged", "a list"],
)
def test_what_ends_pytorch_s_process_is_told_for_what_it_is(torch, message, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch_files.importlib.metadata, "version", {"torch": "2.14.1"}.get)
    file = tmp_path / "good.pth"
    file.write_bytes(in_zip(("archive/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor\n.")))
    with pytest.raises(InputError, match=message) as raised:
        read_arrays(file)
    assert str(raised.value).startswith(f"{file}: ") and "\n" not in str(raised.value)


def test_no_folder_for_the_arrays_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files.importlib.metadata, "version", {"torch": "2.14.1"}.get)
    monkeypatch.setattr(torch_files.tempfile, "tempdir", str(tmp_path / "missing"))
    (tmp_path / "good.pth").write_bytes(in_zip(("archive/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor\n.")))
    with pytest.raises(InputError, match=r"cannot be written for a while \(.*No such file.*set TMPDIR"):
        read_arrays(tmp_path / "good.pth")


def in_zip_before_the_beginning():
    """Whose table of contents says of itself that it begins before the file does."""
    data = bytearray(in_zip(("a/data.pkl", b"\x80\x02}.")))
    place = data.rindex(b"PK\x05\x06") + 16
    struct.pack_into("<I", data, place, struct.unpack_from("<I", data, place)[0] + 10**6)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (in_zip(("a/data.pkl", b""), ("a/constants.pkl", b"")), "2 pickles where torch.save writes one"),
        (in_zip_before_the_beginning(), "Invalid argument"),
        (b"\x80\x02\x8e" + struct.pack("<Q", 2**62), "MemoryError"),
        (in_zip(("a/code/data.pkl", b"")), "1 pickles where torch.save writes one, or TorchScript"),
        (in_zip(("a/data.pkl", b"\x80\x02}."), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (in_zip(("a/data.pkl", b"\x80\x02}."))[:-30], "is not a zip file"),
        (in_zip(("a/data.pkl", b"\x80\x02}")), "pickle exhausted"),
        (legacy(1, 1001), "pickle exhausted"),
        (b"", "0 bytes that are neither safetensors nor written by torch.save"),
        (b"<html>not found</html>", "22 bytes that are neither"),
    ],
    # A zip file holds the time: as a name it would differ from one test process to the next.
    ids=[
        "two pickles",
        "begins before",
        "endless",
        "TorchScript",
        "compressed",
        "cut",
        "pickle cut",
        "legacy cut",
        "empty",
        "text",
    ],
)
def test_a_damaged_pth_is_told_in_one_line(data, message, tmp_path):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(InputError) as raised:
        read_arrays(tmp_path / "x.pth")
    assert message in str(raised.value) and "\n" not in str(raised.value) and "x.pth" in str(raised.value)


def test_a_pickle_that_is_too_large_is_not_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 3)
    (tmp_path / "x.pth").write_bytes(in_zip(("a/data.pkl", b"\x80\x02}.")))
    with pytest.raises(InputError, match="a pickle of 4 bytes"):
        read_arrays(tmp_path / "x.pth")


def test_safetensors_are_read_without_pytorch_in_the_types_they_have(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(2, np.float16),
        "c": np.array(3),
        "d": np.array([1.5, -2], ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    found = read_arrays(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kept", [0, 4, 20, -3])
def test_truncated_safetensors_are_told_in_one_line(kept, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"x\.safetensors: damaged or no such file, \d+ bytes") as raised:
        read_arrays(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("dtype", "count", "message"),
    [
        ("F6_E2M3", 4, "Dtype not understood"),
        ("F8_E5M2", 3, "arrays of a type that NumPy has not .*: save it as float32"),
    ],
)
def test_safetensors_of_a_type_without_a_counterpart_are_told_in_one_line(dtype, count, message, tmp_path):
    header = b'{"a":{"dtype":"%s","shape":[%d],"data_offsets":[0,3]}}' % (dtype.encode(), count)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"123")
    with pytest.raises(InputError, match=rf"x\.safetensors: .*{message}"):
        read_arrays(tmp_path / "x.safetensors")


def test_a_file_with_the_ending_of_the_other_format_is_told(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x\.pth: by its content it is \.safetensors, not \.pth: rename it"):
        read_arrays(tmp_path / "x.pth")
    (tmp_path / "y.safetensors").write_bytes(in_zip(("a/data.pkl", b"\x80\x02}.")))
    with pytest.raises(InputError, match=r"by its content it is \.pth, not \.safetensors: rename it"):
        read_arrays(tmp_path / "y.safetensors")


def test_a_checksum_in_the_name_is_compared_and_other_digits_are_told(tmp_path, capsys):
    checksum = hashlib.sha256(b"weights").hexdigest()
    sha1 = hashlib.sha1(b"weights").hexdigest()
    names = (f"resnet50-{checksum[:8]}.pth", "resnet50.pth", "my-net.pth", f"x-{checksum}.safetensors")
    for name in (*names, f"resnet50s-{sha1[:8]}.pth"):
        (tmp_path / name).write_bytes(b"weights")
        assert sha256_of(tmp_path / name) == checksum
    assert capsys.readouterr().out == ""
    (tmp_path / "model-20230101.pth").write_bytes(b"weights")  # A date.
    assert sha256_of(tmp_path / "model-20230101.pth") == checksum
    assert "the digits in its name begin neither its sha256 nor its sha1" in capsys.readouterr().out
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"weights")
    with pytest.raises(InputError, match=rf"begins with {checksum[:8]}, by its name it should be 0676ba61.*7 bytes"):
        sha256_of(tmp_path / "resnet50-0676ba61.pth")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.pth cannot be read \(No such file or directory\)"):
        sha256_of(tmp_path / "nothing.pth")


# Where PyTorch is installed.


@pytest.fixture
def torch():
    """PyTorch."""
    return pytest.importorskip("torch")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_what_torch_saves_is_read_in_both_its_formats(zipped, container, torch, tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "c": torch.tensor(3),
        "d": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
    }
    content = {container: tensors, "epoch": 3} if container else tensors
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = read_arrays(tmp_path / "x.pth")
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "a": "float32",
        "b": "bfloat16",
        "c": "int64",
        "d": "float16",
    }
    for name, array in found.items():
        np.testing.assert_array_equal(array.astype(np.float64), tensors[name].detach().double().numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_as_written_before_version_0_4_are_read(zipped, torch, tmp_path):
    class Old:
        def __init__(self, tensor):
            self.tensor = tensor

        def __reduce__(self):
            return torch._utils._rebuild_tensor, (self.tensor._typed_storage(), 0, (2, 3), (3, 1))

    torch.save({"a": Old(torch.arange(6.0))}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(read_arrays(tmp_path / "x.pth")["a"], np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_truncated_pth_is_told_in_one_line(zipped, kept, torch, tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1000)}, file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InputError, match=r"damaged or no such file, \d+ bytes") as raised:
        read_arrays(file)
    assert "\n" not in str(raised.value)


def test_a_whole_module_and_what_is_no_array_are_refused(torch, tmp_path):
    torch.save(torch.nn.Conv2d(3, 4, 1), tmp_path / "module.pth")
    with pytest.raises(InputError, match=r"refused.*torch\.nn\.modules\.conv\.Conv2d"):
        read_arrays(tmp_path / "module.pth")
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(InputError, match="epoch is no plain array"):
        read_arrays(tmp_path / "mixed.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list, not arrays by name"):
        read_arrays(tmp_path / "list.pth")


def test_a_pytorch_that_reads_less_safely_is_refused(torch, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch_files.importlib.metadata, "version", {"torch": "2.9.1+cpu"}.get)
    with pytest.raises(InputError, match=r"PyTorch 2\.10 or later is needed.*2\.9\.1"):
        read_arrays(tmp_path / "x.pth")
