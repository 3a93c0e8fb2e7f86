"""Batches and examples from small encoded pictures: what they hold depends on seed and step, on nothing else."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from absl import flags

from dsnet_jax.config import default_config
from dsnet_jax.data.pipeline import evaluation_examples, records_of_step, train_batches
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import Record, Split, open_split
from dsnet_jax.data.specs import SHAPES, DatasetSpec
from dsnet_jax.data.threads import threads_for
from dsnet_jax.errors import InputError

RECORDS, BATCH_SIZE = 11, 4


@dataclasses.dataclass
class Pictures:
    """A split in memory."""

    records: list[Record]
    spec: DatasetSpec = SHAPES
    name: str = "train"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def small_pictures() -> Pictures:
    """Pictures of different sizes; the label holds the record's index, and so does the image's red."""
    records = []
    for index in range(RECORDS):
        image = np.random.default_rng(index).integers(0, 256, (24 + index, 40 - index, 3), np.uint8)
        image[..., 0] = index
        label = np.full(image.shape[:2], index, np.uint8)
        image_png, label_png = (cv2.imencode(".png", pixels)[1].tobytes() for pixels in (image[..., ::-1], label))
        records.append(Record(f"picture_{index:02}", image_png, label_png, label.shape))
    return Pictures(records)


def small_batches():
    config = default_config().data
    config.update(crop_size_hw=(16, 16), batch_size=BATCH_SIZE, read_threads=2)
    return config


@pytest.fixture(scope="module")
def split() -> Pictures:
    return small_pictures()


@pytest.fixture
def prepared(split, tmp_path) -> Split:
    """The same pictures, prepared on disk."""
    source = tmp_path / "source"
    for kind in ("images", "masks"):
        (source / kind / "train").mkdir(parents=True)
        for record in split.records:
            (source / kind / "train" / f"{record.id}.png").write_bytes(
                record.image if kind == "images" else record.label
            )
    (source / "classes.txt").write_text("\n".join(f"class {index}" for index in range(RECORDS)))
    prepare("folder", str(source), str(tmp_path), name="pictures")
    return open_split(str(tmp_path), "pictures", "train")


@pytest.fixture
def data_config():
    return small_batches()


def without_label(split: Pictures) -> Pictures:
    return Pictures([dataclasses.replace(record, label=None) for record in split.records], name="test")


def with_bad(split: Pictures, index: int, **what) -> Pictures:
    records = list(split.records)
    records[index] = dataclasses.replace(records[index], **what)
    return Pictures(records)


def assert_same(got, want):
    got, want = list(got), list(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_batch_holds_images_labels_and_the_records_they_come_from(split, data_config):
    batches = list(train_batches(split, data_config, seed=0, start_step=0, steps=6))
    assert len(batches) == 6
    for batch in batches:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "image": ((BATCH_SIZE, 16, 16, 3), np.uint8),
            "label": ((BATCH_SIZE, 16, 16), np.uint8),
            "record": ((BATCH_SIZE,), np.int64),
        }
        record = np.broadcast_to(batch["record"][:, None, None], batch["label"].shape)
        inside = batch["label"] != 255
        assert inside.any((1, 2)).all()
        np.testing.assert_array_equal(batch["label"][inside], record[inside])
        np.testing.assert_array_equal(batch["image"][..., 0][inside], record[inside])


def test_each_epoch_holds_every_record_once_in_another_order_and_cut_otherwise(split, data_config):
    batches = list(train_batches(split, data_config, seed=0, start_step=0, steps=RECORDS))
    records = np.concatenate([batch["record"] for batch in batches]).reshape(BATCH_SIZE, RECORDS)  # Rows are epochs.
    np.testing.assert_array_equal(np.sort(records), np.tile(np.arange(RECORDS), (BATCH_SIZE, 1)))
    assert len({tuple(epoch) for epoch in records}) == BATCH_SIZE
    assert tuple(records[0]) != tuple(range(RECORDS))

    images = np.concatenate([batch["image"] for batch in batches]).reshape(BATCH_SIZE, RECORDS, -1)
    for record in range(RECORDS):
        assert len({image.tobytes() for image in images[records == record]}) == BATCH_SIZE


def test_another_seed_gives_another_order_and_other_pictures(split, data_config):
    first, second = (next(train_batches(split, data_config, seed, 0, 1)) for seed in (0, 1))
    assert (first["record"] != second["record"]).any()
    only = Pictures(split.records[3:4])
    first, second = (next(train_batches(only, data_config, seed, 0, 1)) for seed in (0, 1))
    assert (first["image"] != second["image"]).any()


def test_to_resume_at_a_step_gives_the_rest_of_the_batches(split, data_config):
    whole = list(train_batches(split, data_config, 0, 0, 9))
    for start_step in (1, 4, 8):
        assert_same(train_batches(split, data_config, 0, start_step, 9), whole[start_step:])
    assert list(train_batches(split, data_config, 0, 9, 9)) == []


@pytest.mark.parametrize(
    ("processors", "asked", "workers", "threads"),
    [(1, 0, 0, 4), (96, 0, 0, 32), (12, 0, 0, 12), (12, 0, 5, 2), (96, 3, 2, 3)],
)
def test_threads_suit_the_machine_unless_a_number_is_asked_for(processors, asked, workers, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(processors))
    assert threads_for(asked, workers) == threads


@pytest.mark.parametrize("read_threads", [0, 1, 5])
def test_batches_do_not_depend_on_the_number_of_threads(split, data_config, read_threads):
    whole = list(train_batches(split, data_config, 0, 0, 9))
    data_config.read_threads = read_threads
    assert_same(train_batches(split, data_config, 0, 0, 9), whole)


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_blocks_of_several_processes_make_up_the_global_batch(split, data_config, process_count):
    shares = [train_batches(split, data_config, 0, 2, 9, index, process_count) for index in range(process_count)]
    steps = zip(*shares, strict=True)
    together = [{key: np.concatenate([share[key] for share in step]) for key in step[0]} for step in steps]
    assert_same(together, train_batches(split, data_config, 0, 2, 9))


def test_workers_yield_the_same_batches_ignore_signals_and_end_with_the_iterator(split, prepared, data_config):
    want = list(train_batches(split, data_config, 0, 1, 25))
    flags.FLAGS.unparse_flags()  # As where the library is used without the command line.
    data_config.worker_count = 2
    batches = train_batches(prepared, data_config, 0, 1, 25)
    got = [next(batches), next(batches)]  # One from each worker: both are running.
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    got += [next(batches) for _ in range(16)]  # More than can have been ready.
    assert_same(got, want[:18])
    batches.close()
    assert not multiprocessing.active_children()


def test_workers_end_when_the_training_process_is_killed():
    script = """
import os, signal
from test_pipeline import small_batches, small_pictures, train_batches

config = small_batches()
config.worker_count = 1
batches = train_batches(small_pictures(), config, 0, 0, 1000000)
next(batches)
print("started", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = killed.communicate(timeout=60)  # Returns when nobody holds the other end any more.
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(killed.pid, signal.SIGKILL)
    assert output == b"started\n"
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("worker_count", [0, 2])
def test_a_record_that_cannot_be_decoded_is_named(split, data_config, worker_count):
    data_config.worker_count = worker_count
    bad = with_bad(split, 7, image=split[7].image[:50])
    with pytest.raises(InputError, match=r"image of record 7 \(picture_07\) of shapes, split train") as caught:
        list(train_batches(bad, data_config, 0, 0, 3))
    assert caught.value.exit_code == 1
    assert not multiprocessing.active_children()


def test_a_label_that_cannot_be_decoded_or_is_not_there_is_named(split, data_config):
    with pytest.raises(InputError, match=r"label of record 7 \(picture_07\) of shapes, split train"):
        list(train_batches(with_bad(split, 7, label=b"GIF89a"), data_config, 0, 0, 3))
    with pytest.raises(InputError, match=r"record \d+ \(picture_\d\d\) of shapes, split test.*no label"):
        next(train_batches(without_label(split), data_config, 0, 0, 3))
    with pytest.raises(InputError, match=r"image of record 7 \(picture_07\)"):
        list(evaluation_examples(with_bad(split, 7, image=b""), 1.0))


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_is_read(split, data_config):
    with pytest.raises(InputError, match=r"batch_size is 4.*3 processes"):
        train_batches(split, data_config, 0, 0, 3, process_index=0, process_count=3)


def test_pictures_are_scaled_into_the_box_of_the_config(split, data_config):
    data_config.update(crop_size_hw=(64, 64), scale_range=(1.0, 1.0), flip_probability=0.0, scale_box=(48, 24))
    for batch in train_batches(split, data_config, 0, 0, 2):
        inside = batch["label"] != 255
        for record, rows, columns in zip(batch["record"], inside.any(2).sum(1), inside.any(1).sum(1), strict=True):
            height, width = 24 + record, 40 - record
            factor = min(48 / max(height, width), 24 / min(height, width))
            assert (rows, columns) == (round(height * factor), round(width * factor))


def test_the_records_of_a_step_are_known_without_reading_them(split, data_config):
    for step, batch in enumerate(train_batches(split, data_config, 7, 0, 9)):
        records = records_of_step(RECORDS, 7, step, BATCH_SIZE)
        assert records.dtype == np.int64
        np.testing.assert_array_equal(records, batch["record"])


@pytest.mark.parametrize("positions", [None, [], [5, 0, 3], range(1, RECORDS, 2)], ids=["all", "none", "some", "odd"])
def test_evaluation_yields_the_examples_asked_for_in_their_order(split, positions):
    examples = list(evaluation_examples(split, 0.5, positions, read_threads=3))
    wanted = range(RECORDS) if positions is None else positions
    assert [example.index for example in examples] == list(wanted)
    for index, example in zip(wanted, examples, strict=True):
        size_hw = (24 + index, 40 - index)
        assert example.id == f"picture_{index:02}"
        assert example.image.shape == (round(size_hw[0] * 0.5), round(size_hw[1] * 0.5), 3)
        assert (example.image[..., 0] == index).all()
        assert example.label_hw == example.label.shape == size_hw
        assert (example.label == index).all()


def test_a_split_without_labels_can_be_evaluated(split):
    examples = list(evaluation_examples(without_label(split), 1.0))
    assert len(examples) == RECORDS
    assert all(example.label is None for example in examples)
    assert examples[3].label_hw == examples[3].image.shape[:2] == (27, 37)


def test_opencv_starts_no_threads_of_its_own_beside_those_that_decode(split, data_config):
    for elements in (train_batches(split, data_config, 0, 0, 1), evaluation_examples(split, 1.0)):
        cv2.setNumThreads(3)
        next(elements)
        assert cv2.getNumThreads() == 1
        elements.close()


def test_evaluation_reads_only_a_few_examples_ahead_and_its_threads_end_with_it(split):
    class Counting(Pictures):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    before = set(threading.enumerate())
    counting = Counting(split.records)
    examples = evaluation_examples(counting, 1.0, read_threads=2)
    next(examples)
    for thread in (reading := set(threading.enumerate()) - before):
        assert "grain" in thread.name
    assert reading
    time.sleep(0.3)  # In which all of them could be read.
    assert counting.reads == 3  # The one that was asked for, and one for each thread.
    examples.close()
    for thread in reading:
        thread.join(timeout=10)
        assert not thread.is_alive()
