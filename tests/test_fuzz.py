"""What scripts/fuzz.py does to the commands, in small and in this process; and that it would see a fault."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dsnet_jax.data import decoding


@pytest.fixture
def fuzz(monkeypatch):
    """scripts/fuzz.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import fuzz

    yield fuzz
    for name in "fuzz", "damaged_files":
        sys.modules.pop(name)


def test_damaged_images_and_masks_are_refused_by_name_or_accepted(fuzz, random_run, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LABELLED_PIXELS", 64 * 64)
    rng = np.random.default_rng(0)
    fuzzed = fuzz.image_round(tmp_path / "files", 40, rng, None, random_run, fuzz.run_here)
    assert fuzzed.faults == []
    for command, damaged in (("prepare", 40), ("predict", 30)):
        counts = {key: count for key, count in fuzzed.counts.items() if key[1] == command and key[0] != "whole"}
        assert {verdict for _, _, verdict in counts} == {"accepted", "refused"}
        assert sum(counts.values()) == damaged
    assert fuzzed.counts["whole", "predict", "accepted"] == 11


def test_damaged_archives_are_refused_by_name_or_accepted(fuzz, tmp_path):
    fuzzed = fuzz.archive_round(tmp_path / "files", 30, np.random.default_rng(0), fuzz.run_here)
    assert fuzzed.faults == []
    assert sum(fuzzed.counts.values()) == 30 + 3
    assert {fuzzed.counts["whole", "prepare", verdict] for verdict in ("accepted", "refused")} == {3, 0}


def test_damaged_weights_are_refused_by_name_or_read(fuzz, tmp_path):
    fuzzed = fuzz.weights_round(tmp_path / "files", 60, np.random.default_rng(0), fuzz.run_here)
    assert fuzzed.faults == []
    assert sum(fuzzed.counts.values()) == 60 + 3
    for kind in ("safetensors", "zip.pth", "legacy.pth"):
        assert fuzzed.counts[kind, "port", "refused"]
    assert fuzzed.counts["whole", "port", "accepted"] == 3


def test_a_fault_is_found(fuzz, tmp_path, monkeypatch):
    def careless(data, name, *_):
        raise ValueError("what is this?")

    monkeypatch.setattr(decoding, "_check_file", careless)
    fuzzed = fuzz.archive_round(tmp_path / "files", 0, np.random.default_rng(0), fuzz.run_here)
    assert any("ValueError: what is this?" in fault for fault in fuzzed.faults)
    assert any("is whole, and prepare refused it" in fault for fault in fuzzed.faults)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os; os.abort()", "the process ended with -6"),
        ("import time; time.sleep(60)", "no end after 1 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_fault(fuzz, tmp_path, monkeypatch, code, fault):
    program = tmp_path / "program.py"
    program.write_text(code)
    monkeypatch.setattr(fuzz, "__file__", str(program))
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    fuzzed = fuzz.archive_round(tmp_path / "files", 0, np.random.default_rng(0), fuzz.run_apart)
    assert all(fault in found for found in fuzzed.faults if "exit code" in found) and fuzzed.faults


def test_the_same_seed_gives_the_same_files(fuzz):
    from damaged_files import damage

    data = bytes(range(256)) * 4
    first, again, other = (
        [damage(data, data, np.random.default_rng((seed, i))) for i in range(20)] for seed in (1, 1, 2)
    )
    assert first == again != other
