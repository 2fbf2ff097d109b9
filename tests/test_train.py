"""train.py as a user runs it: files, interruptions wrong arguments, what is learnt."""

import csv
import math
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train

EPOCHS, STEPS = 4, 5  # of 8 pairs, on the 43 training subjects of the tiny cohort
FILES = {"best.pt", "curves.png", "last.pt", "log.csv"}


def options(cohort, *more, epochs=EPOCHS):
    return ["--data", cohort, "--out", "run", "--batch-size", 8, "--epochs", epochs, *more]


def load(path):
    return torch.load(path, weights_only=True)


def differences(a, b, place=""):
    """Paths at which two checkpoints differ, bit for bit; times of day cannot be the same."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a if k != "seconds" for d in differences(a[k], b[k], f"{place}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for k, (x, y) in pairs for d in differences(x, y, f"{place}/{k}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    return [] if type(a) is type(b) and a == b else [place]


def assert_same_run(folder, other):
    """Checkpoints bit for bit, but for arguments that a continuation may change; log.csv too."""
    for name in ("last.pt", "best.pt"):
        a, b = load(folder / name), load(other / name)
        for checkpoint in (a, b):
            for free in ("resume", "overwrite", "data", "out"):
                checkpoint["args"].pop(free)
        assert differences(a, b) == []
    a, b = read_log(folder), read_log(other)
    for row in (*a, *b):
        row.pop("seconds")
    assert a == b


def read_log(folder):
    return list(csv.DictReader((folder / "log.csv").open()))


def assert_whole_files(folder):
    """Whatever bears a final name can be read to its end."""
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            assert load(folder / name)["model"]
    if (folder / "log.csv").exists():
        rows = read_log(folder)
        assert rows and all(None not in row and all(row.values()) for row in rows)
    if (folder / "curves.png").exists():
        assert (folder / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def in_pairs(attempt, cases):
    """Two subprocesses at a time; a failed assertion in one of them is raised here."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(attempt, cases))


@pytest.fixture(scope="module")
def whole(cohort_folder, run_script, tmp_path_factory):
    """The run that nothing interrupts: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_script("train.py", *options(cohort_folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"folder": folder / "run", "printed": done.stdout}


# ---------------------------------------------------------------- the run folder


def test_run_folder_holds_the_promised_files(whole, cohort_folder):
    assert {path.name for path in whole["folder"].iterdir()} == FILES
    assert_whole_files(whole["folder"])
    last, best = load(whole["folder"] / "last.pt"), load(whole["folder"] / "best.pt")
    for checkpoint in (last, best):
        assert {"model", "optimizer", "epoch", "args", "cohort"} <= checkpoint.keys()
        assert checkpoint["cohort"] == data.open_cohort(cohort_folder)["fingerprint"]
    assert last["epoch"] == EPOCHS and last["args"]["batch_size"] == 8
    rows = read_log(whole["folder"])
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    scores = [float(row["val_total"]) for row in rows]
    assert best["epoch"] == 1 + int(np.argmin(scores))
    for row in rows:
        terms = [float(row[name]) for name in ("ecg_ed", "ecg_es", "ed_es")]
        assert float(row["total"]) == pytest.approx(sum(terms) / 3)


def test_chance_is_printed_beside_loss_and_top1(whole):
    lines = [line for line in whole["printed"].splitlines() if line.startswith("epoch ")]
    assert len(lines) == EPOCHS
    assert all(f"ln B {math.log(8):.2f}" in line for line in lines)
    assert all("chance 16.7%" in line for line in lines)  # 6 validation subjects


# ---------------------------------------------------------------- interruptions

# Code that runs in the process before train.py does. SIGNAL: raised while step 7, the second of
# epoch 2, is under way.
SIGNAL = """
import os, loss
step, backward = 0, loss.backward
def counted(*arguments, **named):
    global step
    step += 1
    if step == 7:
        os.kill(os.getpid(), NUMBER)
    return backward(*arguments, **named)
loss.backward = counted
"""

# Killed from outside, DELAY seconds after the first step began.
KILL_TRAINING = """
import os, subprocess, loss
backward = loss.backward
def first(*arguments, **named):
    loss.backward = backward
    subprocess.Popen(f"sleep DELAY; kill -KILL {os.getpid()}", shell=True)
    return backward(*arguments, **named)
loss.backward = first
"""

# Killed at one rename of a finished file to its final name: before it, with the file cut at a
# random place as if still being written, or just after it.
KILL_SAVING = """
import os, random, signal
count, replace, draw = 0, os.replace, random.Random(SEED)
fatal = draw.randint(1, RENAMES)
def rename(source, target):
    global count
    count += 1
    if count != fatal:
        return replace(source, target)
    if draw.random() < 0.7:
        os.truncate(source, int(draw.random() * os.path.getsize(source)))
    else:
        replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = rename
"""


def test_a_signal_finishes_the_step_and_the_run_continues(
    whole, cohort_folder, run_forked, tmp_path
):
    def attempt(number):
        before = SIGNAL.replace("NUMBER", str(int(number)))
        folder = tmp_path / number.name
        folder.mkdir()
        stopped = run_forked("train.py", *options(cohort_folder), cwd=folder, before=before)
        assert stopped.returncode == 130
        assert "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
        saved = load(folder / "run" / "last.pt")
        assert (saved["epoch"], saved["step"]) == (1, 2)  # one whole epoch, and step 7 was finished
        assert_whole_files(folder / "run")
        done = run_forked("train.py", *options(cohort_folder, "--resume"), cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "epoch 1/4" not in done.stdout and "epoch 2/4" in done.stdout
        assert_same_run(folder / "run", whole["folder"])

    in_pairs(attempt, [signal.SIGTERM, signal.SIGINT])


def kill_and_resume(seed, whole, cohort, run_forked, folder):
    """One SIGKILL, for odd seeds at a random moment of training and for even ones within saving."""
    folder.mkdir()
    if seed % 2:
        seconds = sum(row["seconds"] for row in load(whole["folder"] / "last.pt")["log"])
        delay = random.Random(seed).uniform(0, seconds)
        before = KILL_TRAINING.replace("DELAY", f"{delay:.3f}")
    else:
        # An epoch renames log.csv, best.pt where it is the best so far, and last.pt
        # (the first epoch always is the best); curves.png comes at the end.
        before = KILL_SAVING.replace("SEED", str(seed)).replace("RENAMES", str(2 * EPOCHS + 2))
    killed = run_forked("train.py", *options(cohort), cwd=folder, before=before)
    assert killed.returncode == -signal.SIGKILL, f"seed {seed}: {killed.stdout}{killed.stderr}"
    assert_whole_files(folder / "run")
    done = run_forked("train.py", *options(cohort, "--resume"), cwd=folder)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert_same_run(folder / "run", whole["folder"])
    assert {path.name for path in (folder / "run").iterdir()} == FILES
    shutil.rmtree(folder)  # 50 MB


# The three: some time in training; at the tenth rename, near the end; at the third, of the first
# epoch's last.pt.
@pytest.mark.parametrize(
    "seeds", [(1, 10, 18), pytest.param(range(20), marks=pytest.mark.slow)], ids=["3", "20"]
)
def test_killed_runs_resume_bit_for_bit(whole, cohort_folder, run_forked, tmp_path, seeds):
    def attempt(seed):
        kill_and_resume(seed, whole, cohort_folder, run_forked, tmp_path / str(seed))

    in_pairs(attempt, seeds)


def test_the_rate_warms_up_to_its_peak_and_falls_to_zero():
    def rates(warmup):
        args = SimpleNamespace(lr=0.01, epochs=12, warmup_epochs=warmup)
        return [train.learning_rate(args, step / 32) for step in range(12 * 32)]

    one = rates(1)
    assert one[16] == pytest.approx(0.005) and one[32] == 0.01  # linear, then half a cosine
    assert one[32 + 11 * 16] == pytest.approx(0.005) and one[-1] == pytest.approx(0, abs=1e-6)
    for warmup in (0, 0.001, 1, 12, 50):  # 0.001: shorter than a step
        assert 0 <= min(rates(warmup)) and max(rates(warmup)) <= 0.01


# ---------------------------------------------------------------- refusals


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """train.py's main in this process, which saves 3 s of imports: dict(code, out, err)."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as stop:
            data.exit_cleanly(train.main)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return {"code": stop.value.code} | capsys.readouterr()._asdict()

    return run


@pytest.fixture
def refused(run_here):
    """refused("--epochs", 0): code 2, and one sentence before any work, which is returned."""

    def run(*arguments):
        done = run_here(*arguments)
        assert done["code"] == 2
        assert done["err"].startswith("error: ") and done["err"].count("\n") == 1
        assert done["out"] == ""
        return done["err"]

    return run


@pytest.mark.parametrize("wrong, named", [
    (["--epochs", 0], "--epochs"), (["--epochs", -3], "--epochs"),
    (["--batch-size", 0], "--batch-size"), (["--batch-size", 1], "--batch-size"),
    (["--batch-size", -8], "--batch-size"), (["--batch-size", 44], "43"),
    (["--micro-batch", -1], "--micro-batch"),
    (["--lr", 0], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--weight-decay", -0.1], "--weight-decay"), (["--warmup-epochs", -1], "--warmup-epochs"),
    (["--temperature", 0], "--temperature"), (["--temperature", -0.07], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--weights", 0, 0, 0], "--weights"), (["--weights", -1, 1, 1], "--weights"),
    (["--weights", 1, "nan", 1], "--weights"), (["--weights", 1, 1, "inf"], "--weights"),
    (["--weights", 0, 1, 1, "--phases", "ed"], "--weights"),
    (["--seed", -1], "--seed"), (["--seed", 2**64], "--seed"),
    (["--limit", 1], "--limit"), (["--limit", 0], "--limit"),
    (["--limit", 8, "--batch-size", 9], "--batch-size"),
    (["--data", "nowhere"], "nowhere"), (["--data", "."], "cohort"),
    (["--out", "file"], "file"),
])  # fmt: skip
def test_wrong_arguments_get_one_sentence(cohort_folder, refused, tmp_path, wrong, named):
    (tmp_path / "file").write_text("in the way of a run folder")
    assert named in refused("--data", cohort_folder, "--out", "run", *wrong)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(cohort_folder, run_here, monkeypatch):
    nan = {"total": torch.tensor(math.nan)}
    monkeypatch.setattr(train.loss, "backward", lambda *arguments: nan)
    done = run_here(*options(cohort_folder))
    assert done["code"] == 2 and "--lr" in done["err"] and "Traceback" not in done["err"]


def test_cuda_is_refused_where_there_is_none(cohort_folder, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" in refused("--data", cohort_folder, "--device", "cuda")


def test_wrong_arguments_end_a_real_process_too(run_script, tmp_path):
    done = run_script("train.py", "--temperature", 0, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "--temperature" in done.stderr


def test_with_two_processes_one_says_what_is_wrong_and_none_shows_a_traceback(
    run_script, cohort_folder, tmp_path
):
    """Of train.py, that is: torchrun reports about its processes in its own way."""
    done = run_script("train.py", "--data", "nowhere", cwd=tmp_path, processes=2)
    assert done.returncode and done.stderr.count("nowhere: does not exist") == 1
    assert "train.py" not in done.stderr.split("nowhere: does not exist")[0]
    options = "--data", cohort_folder, "--epochs", 1, "--out", "/proc/x"
    done = run_script("train.py", *options, cwd=tmp_path, processes=2)
    assert done.returncode and done.stderr.count("error: /proc/x: ") == 1
    assert "Connection closed" not in done.stderr and "rank1" not in done.stderr
    assert "[rank" not in done.stderr and "find_cohort" not in done.stderr


@pytest.fixture
def run_copy(whole, tmp_path):
    shutil.copytree(whole["folder"], tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_with_a_run_is_refused(run_copy, whole, cohort_folder, refused):
    assert "--overwrite" in refused(*options(cohort_folder))
    assert_same_run(run_copy, whole["folder"])
    (run_copy / "last.pt").unlink()  # best.pt alone is worth as much
    assert "--overwrite" in refused(*options(cohort_folder))


def test_the_default_batch_is_64_or_what_there_is_in_whole_shares():
    sizes = {(2082, 1): 64, (2082, 3): 63, (43, 1): 43, (43, 2): 42, (34_000, 128): 256}
    assert {key: train.choose_batch_size(None, *key) for key in sizes} == sizes


@pytest.mark.parametrize("changed, named", [
    (["--lr", 1e-3], "--lr was 0.002"), (["--seed", 1], "--seed was 0"),
    (["--batch-size", 9], "--batch-size was 8"), (["--epochs", 5], "--epochs was 4"),
    (["--weights", 1, 1, 0], "--weights was"), (["--phases", "ed"], "--phases was"),
    (["--shuffle-pairs"], "--shuffle-pairs was False"), (["--amp"], "--amp was False"),
    (["--temperature", 0.1, "--limit", 40], "--limit was None"),
])  # fmt: skip
def test_resuming_with_other_arguments_is_refused(
    run_copy, whole, cohort_folder, refused, changed, named
):
    sentence = refused(*options(cohort_folder, "--resume", *changed))
    assert named in sentence
    if "--temperature" in changed:  # every difference is named
        assert "--temperature was 0.07" in sentence
    assert_same_run(run_copy, whole["folder"])


def test_resuming_with_another_cohort_is_refused(run_copy, cohort_folder, refused, tmp_path):
    """The same subjects in another order: every shape fits, only the fingerprint tells."""
    other = tmp_path / "other"
    shutil.copytree(cohort_folder, other)
    header, *rows = (other / "subjects.csv").read_text().splitlines()
    (other / "subjects.csv").write_text("\n".join([header, *rows[::-1], ""]))
    sentence = refused(*options(other, "--resume"))
    assert str(cohort_folder) in sentence and str(other) in sentence


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a checkpoint", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(run_copy, cohort_folder, refused, content):
    (run_copy / "last.pt").write_bytes(content)
    assert "last.pt" in refused(*options(cohort_folder, "--resume"))


def test_a_moved_cohort_is_still_the_same(run_copy, cohort_folder, run_here, tmp_path):
    """Paths may change between a run and its continuation; here there is nothing left to do."""
    shutil.copytree(cohort_folder, tmp_path / "moved")
    before = load(run_copy / "last.pt")
    done = run_here(*options("moved", "--resume"))
    assert done["code"] in (0, None), done["err"]
    assert differences(load(run_copy / "last.pt"), before) == []


# ---------------------------------------------------------------- one run, one result


# The same program in float64, where nothing hides behind rounding.
DOUBLE = """
import models
build, forward = models.DualPhase.__init__, models.DualPhase.forward
def build_double(self, *arguments, **named):
    build(self, *arguments, **named)
    self.double()
def forward_double(self, batch):
    return forward(self, {name: rows.double() for name, rows in batch.items()})
models.DualPhase.__init__, models.DualPhase.forward = build_double, forward_double
"""


@pytest.mark.parametrize(
    "before, cases, tolerance",
    [
        ("", [(0, 1), (5, 1), (0, 2), (3, 2)], 1e-4),
        (DOUBLE, [(0, 1), (5, 1), (0, 2), (3, 2)], 1e-10),
    ],
    ids=["float32", "float64"],
)
def test_micro_batches_and_processes_give_the_same_weights(
    cohort_folder, run_script, run_forked, tmp_path, before, cases, tolerance
):
    """After an epoch of 5 steps of 8 pairs: case is (micro-batch, processes), the first one plain.

    All weights are compared as one vector, relative to its length: Adam makes full steps even
    out of single gradients that are rounding noise around 0.
    """

    def run(case):
        micro_batch, processes = case
        folder = tmp_path / f"{micro_batch}-{processes}"
        folder.mkdir()
        arguments = options(cohort_folder, "--micro-batch", micro_batch, epochs=1)
        start = run_forked if processes == 1 else partial(run_script, processes=processes)
        done = start("train.py", *arguments, cwd=folder, before=before)
        assert done.returncode == 0, done.stderr
        return load(folder / "run" / "last.pt")["model"]

    plain, *others = in_pairs(run, cases)
    length = math.sqrt(sum(value.square().sum() for value in plain.values()))
    for other in others:
        moved = math.sqrt(sum((other[name] - plain[name]).square().sum() for name in plain))
        assert moved <= tolerance * length


@pytest.mark.parametrize("phase", ["ed", "es"])
def test_the_smallest_run_works(cohort_folder, run_forked, tmp_path, phase):
    """Two pairs a step: whatever draws leave nothing to do for a batch happen here."""
    more = ["--batch-size", 2, "--limit", 9, "--phases", phase]
    done = run_forked("train.py", *options(cohort_folder, *more, epochs=3), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert math.isfinite(load(tmp_path / "run" / "last.pt")["log"][-1]["total"])


# ---------------------------------------------------------------- what is learnt


@pytest.fixture(scope="module")
def easy_cohort(tmp_path_factory):
    """Subjects with one number each, plain in the ECG (its rhythm) and in the heart (its size)."""
    rng, count, grid = np.random.default_rng(0), 160, (4, 32, 32)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]

    def subjects():
        for k in range(count):
            latent = rng.random()
            beat = np.sin(2 * np.pi * (1 + 9 * latent) * np.arange(2500) / 250)
            disc = 255 * (np.hypot(y, x) < 0.15 + 0.6 * latent)
            yield {
                "ecg": np.round(1000 * beat * np.ones((12, 1))).astype("<i2"),
                "ed": np.broadcast_to(disc, grid).astype(np.uint8),
                "es": np.broadcast_to(255 - disc, grid).astype(np.uint8),
                "warnings": [],
                "row": {"id": f"{k:03d}", "split": "val" if k < 32 else "train", "latent": latent},
            }

    folder = tmp_path_factory.mktemp("cohorts") / "easy"
    data.write_cohort(folder, subjects(), ["latent"], grid, (30, 6, 6), {"kind": "test"})
    return folder


def test_training_beats_chance_and_shuffled_pairs_do_not(easy_cohort, run_forked, tmp_path):
    """On subjects it has not seen, without the ED-ES term, which shuffled ECGs leave intact."""

    def run(control):
        folder = tmp_path / ("shuffled" if control else "paired")
        folder.mkdir()
        more = ["--batch-size", 16, "--weights", 1, 1, 0, *control]
        done = run_forked("train.py", *options(easy_cohort, *more, epochs=5), cwd=folder)
        assert done.returncode == 0, done.stderr
        return load(folder / "run" / "last.pt")["log"][-1]

    paired, shuffled = in_pairs(run, ([], ["--shuffle-pairs"]))
    assert paired["val_total"] < 0.7 * math.log(16)
    assert min(paired["val_top1_ecg_ed"], paired["val_top1_ecg_es"]) > 2 / 16
    assert shuffled["val_total"] > 0.95 * math.log(16)
    assert shuffled["val_top1_ecg_ed"] + shuffled["val_top1_ecg_es"] < 2 * 2.5 / 16
