"""Random damage to valid files: a sentence or a correct read, no crash, hang or huge allocation.

Every mutation flips, cuts or inserts bytes at places drawn from a fixed seed. Memory is bounded by
the system's limit on address space, so that an allocation beyond 1 GB fails as MemoryError.
"""

import gzip
import resource
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_files import rhythm, write_manifest, write_subject, write_wfdb, xml_text

import data
import evaluate
import models
import train

LONGEST_S, MOST_BYTES = 2.0, 2**30


@pytest.fixture
def one_gigabyte():
    """Let this process map at most 1 GB more than now while a test runs."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def mutate(content, rng, head=None):
    """Flip, cut, insert, repeat or overwrite some bytes, half of the time in the first `head`."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        end = len(content) if head is None or rng.random() < 0.5 else min(head, len(content))
        at, length = int(rng.integers(0, max(end, 1))), int(2 ** rng.uniform(0, 7))
        some = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        kind = rng.integers(0, 6)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = some
        elif kind == 3:
            content[at : at + length] = content[at : at + length] * 2
        elif kind == 4:
            content[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"9999", b"-1  "])
        else:
            del content[at:]
    return bytes(content)


def assert_sentence(error):
    text = str(error)
    assert 20 < len(text) < 900 and text.isprintable(), text


def attack(path, read, count, seed, head=None):
    """Damage one file `count` times; read() must return or raise InputError, soon."""
    original, rng = path.read_bytes(), np.random.default_rng(seed)
    read_well = 0
    for k in range(count):
        path.write_bytes(mutate(original, rng, head))
        started = time.time()
        try:
            read()
            read_well += 1
        except data.InputError as error:
            assert_sentence(error)
            cause = error.__context__  # a sentence about memory, too, would hide a huge allocation
            assert not isinstance(cause, MemoryError) and "allocate" not in str(cause), repr(cause)
        except BaseException as error:
            raise AssertionError(f"mutation {k} of seed {seed}: {error!r}") from error
        assert time.time() - started < LONGEST_S, f"mutation {k} of seed {seed} takes too long"
    path.write_bytes(original)
    read()  # and the undamaged file can still be read
    return read_well


def read_ecg(path):
    ecg = data.read_clean_ecg(path)["ecg"]
    assert ecg.shape == (12, 2500) and ecg.dtype == np.int16 and np.abs(ecg).max() <= 10_000


def read_hearts(row):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no silent overflow or division by zero
        heart = data.center_heart(data.read_phases(row))
    assert heart["ed"].shape == data.GRID and heart["ed"].dtype == np.uint8


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    row = write_subject(folder, "a")
    (folder / "a.xml").write_text(xml_text(rhythm()[:, :5000]))
    write_wfdb(folder / "m.hea", rhythm(), end="mat")
    for phase in ("ed", "es"):
        content = gzip.decompress((folder / f"a_{phase}.nii.gz").read_bytes())
        (folder / f"a_{phase}.nii").write_bytes(content)
    rows = [row | {"id": str(k), "age": "60", "LVEF_pct": "55"} for k in range(5)]
    write_manifest(folder, rows)
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort of five rows and a run on it with a small but whole checkpoint."""
    folder = tmp_path_factory.mktemp("cohort") / "c"
    rng = np.random.default_rng(0)
    subjects = [
        {
            "ecg": rng.integers(-999, 999, (12, 2500), np.int16),
            "ed": rng.integers(0, 255, (12, 16, 16), np.uint8),
            "es": rng.integers(0, 255, (12, 16, 16), np.uint8),
            "warnings": [],
            "row": {"id": str(k), "split": ("train", "val", "test")[k % 3], "LVEF_pct": 50 + k},
        }
        for k in range(5)
    ]
    data.write_cohort(folder, subjects, ["LVEF_pct"], (12, 16, 16), (10, 9, 9), {"kind": "test"})
    return folder


def read_cohort(folder):
    opened = data.open_cohort(folder)
    batch = data.read_batch(opened, [0, len(opened["ids"]) - 1])
    assert all(torch.isfinite(part).all() for part in batch.values())


# name -> (file to damage, how it is read, bytes of its head, weight among the mutations)
TARGETS = {
    "xml": ("a.xml", lambda f: read_ecg(f / "a.xml"), None, 2),
    "wfdb header": ("a.hea", lambda f: read_ecg(f / "a.hea"), None, 4),
    "wfdb signal": ("m.mat", lambda f: read_ecg(f / "m.hea"), None, 1),
    "nifti": ("a_ed.nii", lambda f: read_hearts(phases(f, ".nii")), 352, 4),
    "nifti gz": ("a_es.nii.gz", lambda f: read_hearts(phases(f, ".nii.gz")), 400, 3),
    "manifest": ("manifest.csv", lambda f: data.read_manifest(f / "manifest.csv"), None, 2),
    "cohort.json": ("cohort.json", read_cohort, None, 3),
    "subjects.csv": ("subjects.csv", read_cohort, None, 2),
    "npy": ("ed.npy", read_cohort, 128, 3),
}
SHARE = sum(weight for *_, weight in TARGETS.values()) + 2  # two parts for checkpoints


def phases(folder, end):
    return {name: str(folder / f"a_{name}{end}") for name in ("ed", "es")}


def copy_of(source, target):
    shutil.copytree(source, target)
    return target


def attack_target(name, raw, cohort, tmp_path, total, seed):
    file, read, head, weight = TARGETS[name]
    source = cohort if name in ("cohort.json", "subjects.csv", "npy") else raw
    folder = copy_of(source, tmp_path / "copy")
    count = -(-total * weight // SHARE)
    read_well = attack(folder / file, lambda: read(folder), count, seed, head)
    assert read_well < count, "no mutation was noticed: is the file read at all?"


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name, raw, cohort, tmp_path, one_gigabyte):
    attack_target(name, raw, cohort, tmp_path, 500, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files(name, raw, cohort, tmp_path, one_gigabyte):
    attack_target(name, raw, cohort, tmp_path, 5000, 1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, cohort):
    """A run folder as train.py writes it, of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = models.DualPhase(["ed"])
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=1e-3)
    args = {"phases": ["ed"], "data": str(cohort)}
    done = {"epoch": 1, "step": 0, "sums": {}, "log": [], "best": 1.0}
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "args": args, **done}
    fingerprint = data.open_cohort(cohort)["fingerprint"]
    for name in ("best.pt", "last.pt"):
        torch.save({**saved, "cohort": fingerprint}, folder / name)
    return folder, args, model, optimizer


def attack_checkpoint(name, run_folder, cohort, tmp_path, total, seed):
    source, args, model, optimizer = run_folder
    folder, opened = copy_of(source, tmp_path / "copy"), data.open_cohort(cohort)

    def read():
        if name == "best.pt":
            return evaluate.load_run(folder)
        options = type("Arguments", (), {**args, "out": str(folder), "resume": True})()
        return train.resume(options, opened, model, optimizer)

    attack(folder / name, read, -(-total // SHARE), seed, 4000)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_damaged_checkpoints(name, run_folder, cohort, tmp_path, one_gigabyte):
    attack_checkpoint(name, run_folder, cohort, tmp_path, 500, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_many_damaged_checkpoints(name, run_folder, cohort, tmp_path, one_gigabyte):
    attack_checkpoint(name, run_folder, cohort, tmp_path, 5000, 1)
