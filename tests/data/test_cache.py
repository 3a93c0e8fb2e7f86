"""Decoded once: the same pictures and batches as before, from a file that is complete or not there."""

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsnet_jax.config import default_config
from dsnet_jax.data import cache
from dsnet_jax.data.cache import DecodedSplit, decode_picture, decoded_once
from dsnet_jax.data.pipeline import evaluation_examples, train_batches
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.errors import InputError

RECORDS = 7
PLENTY = 10**6


def write_source(folder: Path, seed: int):
    for split, kinds in {"train": ("images", "masks"), "test": ("images",)}.items():
        for kind in kinds:
            (folder / kind / split).mkdir(parents=True)
        for index in range(RECORDS):
            rng = np.random.default_rng((seed, index))
            size_hw = 20 + index, 33 - index
            pixels = {"images": rng.integers(0, 256, (*size_hw, 3)), "masks": rng.integers(0, 3, size_hw)}
            for kind in kinds:
                cv2.imwrite(str(folder / kind / split / f"picture_{index}.png"), pixels[kind].astype(np.uint8))
    (folder / "masks").mkdir(exist_ok=True)
    (folder / "classes.txt").write_text("a\nb\nc\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    write_source(root / "source", 0)
    prepare("folder", str(root / "source"), str(root), name="pictures")
    return root


@pytest.fixture(scope="module")
def split(root) -> Split:
    return open_split(str(root), "pictures", "train")


def small_config(worker_count: int = 0):
    config = default_config().data
    config.update(crop_size_hw=(16, 16), batch_size=4, read_threads=2, worker_count=worker_count)
    return config


def never_decode(*_, **__):
    raise AssertionError("decoded again")


def assert_same_pictures(decoded: DecodedSplit, split: Split):
    assert len(decoded) == len(split)
    for index in range(len(split)):
        got, want = decoded[index], decode_picture(split, index)
        assert got.id == want.id
        np.testing.assert_array_equal(got.image, want.image)
        np.testing.assert_array_equal(got.label, want.label)


def test_pictures_are_those_that_decoding_gives_and_are_not_decoded_again(split, tmp_path, monkeypatch, capsys):
    decoded = decoded_once(split, tmp_path, PLENTY)
    assert_same_pictures(decoded, split)
    size = sum(4 * (20 + index) * (33 - index) for index in range(RECORDS))
    assert size < decoded.file.stat().st_size < size + 1000
    said = f"7 pictures decoded once, {decoded.file.stat().st_size} bytes in {decoded.file}"
    assert said in capsys.readouterr().out
    want = [decode_picture(split, index).image for index in range(RECORDS)]

    monkeypatch.setattr(cache, "decode_picture", never_decode)
    again = decoded_once(split, tmp_path, PLENTY)
    assert "7 pictures decoded before" in capsys.readouterr().out
    for index in range(RECORDS):
        np.testing.assert_array_equal(again[index].image, want[index])
    with pytest.raises(IndexError):
        again[RECORDS]
    with pytest.raises(ValueError, match="read-only"):
        again[0].image[0, 0] = 1


@pytest.mark.parametrize("worker_count", [0, 1])
def test_batches_are_the_same_to_the_bit(split, tmp_path, worker_count):
    decoded = decoded_once(split, tmp_path, PLENTY)
    want = list(train_batches(split, small_config(), 3, 1, 9))
    got = list(train_batches(decoded, small_config(worker_count), 3, 1, 9))
    assert len(got) == len(want) == 8
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_evaluation_gives_the_same_examples_with_and_without_labels(root, tmp_path):
    for name in ("train", "test"):
        split = open_split(str(root), "pictures", name)
        want = list(evaluation_examples(split, 0.5))
        for a, b in zip(evaluation_examples(decoded_once(split, tmp_path, PLENTY), 0.5), want, strict=True):
            assert (a.index, a.id, a.label_hw) == (b.index, b.id, b.label_hw)
            np.testing.assert_array_equal(a.image, b.image)
            assert (a.label is None) == (b.label is None) == (name == "test")
            np.testing.assert_array_equal(a.label, b.label)


def test_a_copy_for_another_process_holds_no_pixels(split, tmp_path):
    decoded = decoded_once(split, tmp_path, PLENTY)
    copy = pickle.dumps(decoded)
    assert len(copy) < len(pickle.dumps(split)) + 1000 < decoded.file.stat().st_size
    assert_same_pictures(pickle.loads(copy), split)


def test_other_content_and_another_decoder_make_another_file(split, tmp_path, monkeypatch):
    first = decoded_once(split, tmp_path / "decoded", PLENTY)
    write_source(tmp_path / "source", 1)
    prepare("folder", str(tmp_path / "source"), str(tmp_path), name="pictures")
    other = open_split(str(tmp_path), "pictures", "train")
    second = decoded_once(other, tmp_path / "decoded", PLENTY)
    monkeypatch.setattr(cv2, "__version__", "6.0.0")
    third = decoded_once(split, tmp_path / "decoded", PLENTY)
    assert len({first.file, second.file, third.file}) == 3
    assert_same_pictures(first, split)
    assert_same_pictures(second, other)


def test_a_split_that_is_too_large_is_refused_with_its_size_before_anything_is_decoded(split, tmp_path, monkeypatch):
    needed = sum(4 * (20 + index) * (33 - index) for index in range(RECORDS))
    monkeypatch.setattr(cache, "decode_picture", never_decode)
    with pytest.raises(InputError, match=f"pictures, split train: {needed} bytes .* limit of {needed - 1}: .*"):
        decoded_once(split, tmp_path, needed - 1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    decoded_once(split, tmp_path, needed)


def test_a_full_disk_is_one_line_and_leaves_nothing(split, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        patch.setattr(cache, "decode_picture", never_decode)
        with pytest.raises(
            InputError, match=r"cannot be written \(no space left\): \d+ bytes are needed and 100"
        ) as it:
            decoded_once(split, tmp_path, PLENTY)
    assert "\n" not in str(it.value)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:  # It fills up while the file is written.
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
            decoded_once(split, tmp_path, PLENTY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(split, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written \(.*\): make it writable, or decode each time"):
        decoded_once(split, tmp_path / "file", PLENTY)


def decode_slowly(root: str, folder: str):
    original = cache.decode_picture

    def slowly(split, index):
        if index == 5:
            print("half", flush=True)
            time.sleep(600)
        return original(split, index)

    cache.decode_picture = slowly
    decoded_once(open_split(root, "pictures", "train"), Path(folder), PLENTY)


def test_what_a_killed_process_left_is_not_taken_for_complete_and_is_removed(root, split, tmp_path):
    script = "import sys, test_cache; test_cache.decode_slowly(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(root), str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    decoded = decoded_once(split, tmp_path, PLENTY)
    assert_same_pictures(decoded, split)
    assert list(tmp_path.iterdir()) == [decoded.file]


def decode_and_count(root: str, folder: str, counts):
    original = cache.decode_picture

    def counted(split, index):
        with counts.get_lock():
            counts.value += 1
        time.sleep(0.05)
        return original(split, index)

    cache.decode_picture = counted
    decoded_once(open_split(root, "pictures", "train"), Path(folder), PLENTY)


def test_of_two_processes_one_decodes_and_the_other_waits(root, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    counts = spawn.Value("i", 0)
    processes = [spawn.Process(target=decode_and_count, args=(str(root), str(tmp_path), counts)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert counts.value == RECORDS


@pytest.mark.parametrize("damage", ["cut", "empty", "index", "tail"])
def test_a_file_that_is_not_complete_is_made_anew_and_that_is_said(split, tmp_path, damage, capsys):
    file = decoded_once(split, tmp_path, PLENTY).file
    data = bytearray(file.read_bytes())
    if damage == "index":
        data[-100] ^= 1
    file.write_bytes({"cut": data[1000:], "empty": b"", "index": data, "tail": data[:-30]}[damage])
    assert_same_pictures(decoded_once(split, tmp_path, PLENTY), split)
    assert f"{file}: not complete: made anew" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_is_noticed_in_image_and_label_and_the_record_named(split, tmp_path, place):
    decoded = decoded_once(split, tmp_path, PLENTY)
    starts = np.cumsum([0, *(4 * np.prod(split.sizes_hw, axis=1))])
    data = bytearray(decoded.file.read_bytes())
    data[starts[3] if place == 0 else starts[4] - 1] ^= 4
    decoded.file.write_bytes(data)
    damaged = DecodedSplit(split, decoded.file)
    with pytest.raises(
        InputError, match=r"\.decoded: record 3 \(picture_3\) of pictures, split train is not as it was"
    ):
        damaged[3]
    damaged[2], damaged[4]


def test_a_record_is_checked_once(split, tmp_path, monkeypatch):
    decoded = decoded_once(split, tmp_path, PLENTY)
    sums = []
    original = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda *data: sums.append(1) or original(*data))
    for index in (2, 2, 3, 2):
        decoded[index]
    assert len(sums) == 2


def test_a_record_that_cannot_be_decoded_is_named_and_leaves_nothing(split, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "decode_image", lambda data, name, pixels: cache.decode_mask(b"GIF", name))
    with pytest.raises(InputError, match=r"image of record \d \(picture_\d\) of pictures, split train"):
        decoded_once(split, tmp_path, PLENTY)
    assert list(tmp_path.iterdir()) == []
