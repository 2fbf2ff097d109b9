"""Damaged files are read or refused, never misread; killed processes leave whole files or none."""

import gzip
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import raw_files as raw
import torch

import data

# ---------------------------------------------------------------- damaged files


def read_ecg(name):
    return lambda folder: data.read_ecg({"ecg": name}, folder)[0]


def read_images(ending, names=("ed", "es")):
    row = {name: f"a_{name}{ending}" for name in names}
    return lambda folder: np.stack([*data.crop_heart(data.read_scan(row, folder))[0].values()])


def read_manifest(folder):
    return np.array([len(row.problem) for row in data.read_manifest(folder / "manifest.csv")[0]])


def read_cohort(folder):
    cohort = data.open_cohort(folder / "c")
    batches = data.plain_batches(data.CohortDataset(cohort), np.arange(len(cohort.ids)))
    return np.concatenate([tensor.flatten() for tensor in next(batches).values()])


RNG = np.random.default_rng(0)
TARGETS = {"a.xml": read_ecg("a.xml"), "a.hea": read_ecg("a.hea"), "a.dat": read_ecg("a.hea")}
TARGETS.update({"m.mat": read_ecg("m.hea"), "a.npy": read_ecg("a.npy")})
TARGETS.update({"a_ed.nii": read_images(".nii"), "a_es.nii.gz": read_images(".nii.gz")})
TARGETS.update({"a_mask.nii": read_images(".nii", ("ed", "es", "mask"))})
TARGETS.update({"manifest.csv": read_manifest})
TARGETS.update({f"c/{name}": read_cohort for name in ("cohort.json", "subjects.csv", "ed.npy")})


@pytest.fixture
def folder(tmp_path):
    """A good file of every kind."""
    row = raw.write_subject(tmp_path)
    raw.write_bad(tmp_path / "a", "xml", None)
    raw.write_bad(tmp_path / "a", "npy", None)
    raw.write_wfdb(tmp_path / "m.hea", raw.rhythm(), end="mat")
    raw.write_nifti(tmp_path / "a_mask.nii.gz", (raw.heart_volumes()[0] > 200).astype(np.int16))
    for packed in tmp_path.glob("*.nii.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    raw.write_manifest(tmp_path, [{**row, "id": str(k), "LVEF_pct": "55"} for k in range(5)])
    data.write_cohort(tmp_path / "c", raw.random_subjects(3), ["x"], {"kind": "test"})
    return tmp_path


def read_or_refuse(read, folder):
    """What is read, or None after an InputError of one sentence. Nothing else may be raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on absurd scales in headers
        try:
            array = read(folder)
        except data.InputError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
            return None
    assert np.isfinite(array).all()
    return array


@pytest.mark.parametrize(("name", "flips"), [("a_es.nii.gz", 300), ("m.mat", 200)])
def test_no_single_bit_flip_is_accepted_with_changed_samples(name, flips, folder):
    original = TARGETS[name](folder)
    content = (folder / name).read_bytes()
    refused = 0
    for bit in np.random.default_rng(0).choice(8 * len(content), flips, replace=False):
        (folder / name).write_bytes(raw.flipped(content, bit))
        array = read_or_refuse(TARGETS[name], folder)
        assert array is None or np.array_equal(array, original), bit
        refused += array is None
    assert refused > 0.9 * flips


@pytest.mark.parametrize("count", [20, pytest.param(417, marks=pytest.mark.slow)])  # 5,004 in all
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_with_a_sentence(name, count, folder):
    content = (folder / name).read_bytes()
    rng = np.random.default_rng(count)
    refused = 0
    for _ in range(count):
        (folder / name).write_bytes(raw.mutated(content, rng))
        started = time.time()
        refused += read_or_refuse(TARGETS[name], folder) is None
        assert time.time() - started < 5
    assert refused > 0, "no damage was noticed: is the file read at all?"


# ---------------------------------------------------------------- kills


def run(command, folder, kill_after=None):
    """Run a script in a process of its own: exit code, or None if killed after some seconds."""
    script, *arguments = command.split()
    words = [sys.executable, Path(data.__file__).with_name(script), *arguments]
    try:
        return subprocess.run(words, cwd=folder, capture_output=True, timeout=kill_after).returncode
    except subprocess.TimeoutExpired:  # by SIGKILL
        return None


def kills(command, folder, parts):
    """Seconds after which to kill a script, at parts of its time; the last is None: to its end."""
    started = time.time()
    assert run(command, folder) == 0
    return [*parts * (time.time() - started), None]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["data.py prepare manifest.csv", "synthetic.py --subjects 300"])
def test_a_killed_writer_leaves_no_cohort_or_a_whole_one(command, tmp_path):
    row = raw.write_subject(tmp_path)
    raw.write_manifest(tmp_path, [{**row, "id": str(k)} for k in range(300)])
    command += " made --workers 2"
    for seconds in kills(command, tmp_path, RNG.uniform(0.3, 0.7, 6)):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        code = run(command, tmp_path, seconds)
        if (tmp_path / "made").exists():
            assert len(data.open_cohort(tmp_path / "made").ids) == 300
    assert code == 0


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_it_had_not_been(cohort_folder, tmp_path):
    command = f"train.py --data {cohort_folder} --epochs 24 --batch-size 16 --out"
    last = tmp_path / "run" / "last.pt"
    for seconds in kills(f"{command} whole", tmp_path, RNG.uniform(0.3, 0.5, 8)):
        mode = "--resume" if last.exists() else "--overwrite"
        code = run(f"{command} run {mode}", tmp_path, seconds)
        for path in (tmp_path / "run").glob("*.pt"):
            torch.load(path, weights_only=True)
    assert code == 0
    whole = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    resumed = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
