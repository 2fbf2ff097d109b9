"""train.py as a user runs it: files, one result, interruptions, refusals, what is learnt."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import loss
import models
import synthetic
import train

EPOCHS = 4  # of 5 steps of 8 pairs, on the 43 training subjects of the tiny cohort


def options(cohort, *more):
    return [*f"--data {cohort} --out run --batch-size 8 --epochs 4 --seed 2".split(), *more]


@pytest.fixture
def run(cohort_folder, run_script, tmp_path):
    """run("--lr", 1) -> what train.py prints in this test's folder; code: the expected exit."""

    def start(*more, code=0):
        finished = run_script("train.py", *options(cohort_folder, *more), cwd=tmp_path)
        assert finished.returncode == code, finished.stderr
        return finished

    return start


@pytest.fixture(scope="module")
def whole(cohort_folder, run_script, tmp_path_factory):
    """The run that nothing interrupts: (its folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("whole")
    finished = run_script("train.py", *options(cohort_folder), cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return cwd / "run", finished.stdout


@pytest.fixture
def run_copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def load(path):
    return torch.load(path, weights_only=True)


def read_log(folder):
    return np.genfromtxt(folder / "log.csv", delimiter=",", names=True, ndmin=1)


def assert_same_run(folder, other):
    """Bit for bit, but for the seconds that an epoch took."""
    for name in ("last.pt", "best.pt"):
        a, b = load(folder / name), load(other / name)
        for row in (*a["log"], *b["log"]):
            del row["seconds"]
        for key in ("model", "optimizer", "log"):
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_run_folder_holds_the_promised_files(whole, cohort_folder):
    folder, _ = whole
    names = " ".join(sorted(path.name for path in folder.iterdir()))
    assert names == "best.pt curves.png ecg_encoder.pt last.pt log.csv"
    last, best = load(folder / "last.pt"), load(folder / "best.pt")
    for checkpoint in (last, best):
        assert set(checkpoint) == {"model", "optimizer", "args", "log", "cohort"}
        assert checkpoint["cohort"] == data.open_cohort(cohort_folder).fingerprint
    log = read_log(folder)
    assert log["epoch"].tolist() == [row["epoch"] for row in last["log"]] == [1, 2, 3, 4]
    assert len(best["log"]) == 1 + np.argmin(log["val_total"]) < EPOCHS  # not just the last one
    encoder = models.ecg_encoder()
    encoder.load_state_dict(load(folder / "ecg_encoder.pt"))
    model = models.build(SimpleNamespace(**best["args"]))
    model.load_state_dict(best["model"])
    ecg = torch.randn(3, 12, 2500)
    assert torch.equal(encoder(ecg), model({"ecg": ecg})["ecg"])


def test_the_loss_starts_at_the_scale_of_chance_and_falls(whole):
    folder, printed = whole
    totals = read_log(folder)["total"]
    assert 0.5 * math.log(8) < totals[0] < 2 * math.log(8)
    assert totals[-1] < 0.8 * totals[0]
    assert printed.count("ln B 2.08") == printed.count("chance 16.7%") == EPOCHS  # of 8, and of 6


@pytest.mark.parametrize("words, weights", [
    ("", {"ecg_ed": 1, "ecg_es": 1, "ed_es": 1}),
    ("--weights ed_es=0 ecg_ed=3", {"ecg_ed": 3, "ecg_es": 1, "ed_es": 0}),
    ("--views joint ed --slices 3 --weights ecg_joint=2", {"ecg_ed": 1, "ecg_joint": 2}),
    ("--views es --batch-size 2 --limit 5 --warmup-epochs 3", {"ecg_es": 1}),  # hardly a run
])  # fmt: skip
def test_views_and_weights_by_name(run, tmp_path, words, weights):
    run("--epochs", 1, *words.split())
    (row,) = read_log(tmp_path / "run")
    assert {"_".join(pair) for pair in loss.PAIRS} & set(row.dtype.names) == set(weights)
    terms = [row[pair] for pair in weights]
    assert row["total"] == pytest.approx(np.average(terms, weights=[*weights.values()]))


@pytest.mark.parametrize("more, processes, tolerance", [
    (["--workers", 2], 1, 0), (["--micro-batch", 3], 1, 1e-4), (["--micro-batch", 3], 2, 1e-4),
])  # fmt: skip
def test_workers_micro_batches_and_processes_change_rounding_alone(
    run, start_script, cohort_folder, tmp_path, more, processes, tolerance
):
    """All weights after an epoch, as one vector: Adam makes full steps even of rounding noise."""
    run("--epochs", 1)
    more = ["--epochs", 1, "--out", "other", *more]
    if processes == 1:
        run(*more)
    else:
        more = options(cohort_folder, *more)
        finished = start_script("train.py", *more, cwd=tmp_path, processes=processes)
        assert finished.returncode == 0, finished.stderr
    states = [load(tmp_path / name / "last.pt")["model"] for name in ("run", "other")]
    a, b = [torch.cat([value.flatten() for value in state.values()]) for state in states]
    assert (a - b).norm() <= tolerance * a.norm()


def test_the_rate_warms_up_to_its_peak_and_falls_to_zero():
    """The factor of the peak rate in 12 epochs of 32 steps: linear, then half a cosine."""

    def factors(warmup_epochs, epochs=12):
        args = SimpleNamespace(epochs=epochs, warmup_epochs=warmup_epochs)
        return [train.warmup_then_cosine(step, args, 32) for step in range(epochs * 32)]

    one = factors(1)
    assert one[32] == 1 and one[-1] < 1e-4
    assert one[16] == pytest.approx(0.5) == one[32 + 11 * 16]
    for case in ((0, 12), (0.001, 12), (12, 12), (50, 12), (0, 1), (1, 1), (5, 1)):
        assert all(0 < factor <= 1 for factor in factors(*case))


def test_weight_decay_shrinks_matrices_alone():
    model = models.build(SimpleNamespace(views=["ed"], slices=12))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = train.make_optimizer(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        is_vector = name.endswith("bias") or "norm" in name
        torch.testing.assert_close(value, before[name] * (1 if is_vector else 1 - 0.1 * 0.5))


@pytest.mark.parametrize("step, epochs", [(2, 0), (11, 2), (20, 3)])
def test_an_interrupted_run_resumes_bit_for_bit(run, run_copy, whole, monkeypatch, step, epochs):
    """Ctrl-C while a training step of a run that replaces an older one is under way."""
    to_batch = data.to_batch
    steps = iter(range(1, 1000))

    def interrupted(*arguments, seed=None):
        if seed is not None and next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return to_batch(*arguments, seed=seed)

    monkeypatch.setattr(data, "to_batch", interrupted)
    stopped = run("--overwrite", code=130)
    assert ("--resume" in stopped.stderr) == (epochs > 0)
    finished = run("--resume" if epochs else "--overwrite")
    assert f"epoch {epochs}/4" not in finished.stdout
    assert f"epoch {epochs + 1}/4" in finished.stdout
    assert_same_run(run_copy, whole[0])


@pytest.mark.parametrize("seeds", [[0], pytest.param(range(20), marks=pytest.mark.slow)], ids=len)
def test_killed_runs_resume_bit_for_bit(run, whole, cohort_folder, tmp_path, seeds):
    """SIGKILL at a random moment after the first checkpoint: no name ever holds half a file."""
    for seed in seeds:
        folder = tmp_path / f"run{seed}"
        arguments = options(cohort_folder, "--out", folder.name)
        command = [sys.executable, train.__file__, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while not (folder / "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        process.kill()
        process.wait()
        run("--out", folder.name, "--resume")
        assert_same_run(folder, whole[0])


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "validation"])
def test_a_loss_that_is_no_number_ends_the_run(run, monkeypatch, tmp_path, is_training):
    true_loss = loss.dual_phase_loss

    def broken(*arguments):
        losses = true_loss(*arguments)
        if torch.is_grad_enabled() == is_training:
            losses["total"] = losses["total"] * math.nan
        return losses

    monkeypatch.setattr(loss, "dual_phase_loss", broken)
    assert "--lr" in run("--epochs", 1, code=2).stderr
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.fixture
def refused(run, tmp_path):
    """refused("--epochs", 0): one sentence, which is returned; no file has changed."""

    def start(*more):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        stopped = run(*more, code=2)
        assert stopped.stdout == "" and stopped.stderr.startswith("error: ")
        assert stopped.stderr.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
        return stopped.stderr

    return start


BAD_VALUES = """
--epochs 0; --epochs -3; --slices 0; --slices 13; --batch-size 0; --batch-size 1; --batch-size -8
--batch-size 44; --batch-size 9 --limit 8; --limit 1; --limit 0; --micro-batch 0; --micro-batch -1
--lr 0; --lr nan; --lr inf; --lr -1; --weight-decay -0.1; --weight-decay nan; --warmup-epochs -1
--temperature 0; --temperature -0.07; --temperature nan; --seed -1; --seed 9223372036854775808
--warmup-epochs nan; --workers -1; --workers 1000; --device cuda
--weights ed_es; --weights ed_es=; --weights ed_es=x; --weights ed_es=-1; --weights ed_es=nan
--weights ed_es=inf; --weights es_ed=1; --weights =1; --weights 1; --weights ecg_joint=1
--weights ecg_ed=0 ecg_es=0 ed_es=0; --weights ed_es=1 --views ed; --weights ecg_ed=0 --views ed
--data=; --data nowhere; --data .; --data file; --out=; --out file; --resume; --resume --overwrite
""".strip().replace("\n", "; ")


@pytest.mark.parametrize("words", BAD_VALUES.split("; "))
def test_wrong_arguments_get_one_sentence(refused, monkeypatch, tmp_path, words):
    """It names the option or the path that is wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("in the way")
    option, *values = words.split()
    sentence = refused(option, *values)
    assert option.strip("=") in sentence or values[0] in sentence


@pytest.mark.parametrize("words, differences", [
    ("--lr 1e-3", ["--lr was 0.002"]), ("--seed 1", ["--seed was 2"]),
    ("--epochs 5", ["--epochs was 4"]), ("--batch-size 9", ["--batch-size was 8"]),
    ("--slices 6", ["--slices was 12"]), ("--views ed", ["--views was"]), ("--amp", ["--amp was"]),
    ("--weights ed_es=0", ["--weights was"]), ("--shuffle-pairs", ["--shuffle-pairs was False"]),
    ("--temperature 0.1 --limit 40", ["--temperature was 0.07", "--limit was None"]),
])  # fmt: skip
def test_resuming_with_other_arguments_is_refused(run_copy, refused, words, differences):
    sentence = refused("--resume", *words.split())
    assert all(difference in sentence for difference in differences)


def test_an_argument_that_the_run_did_not_know_counts_as_its_default(run_copy, run, refused):
    saved = load(run_copy / "last.pt")
    del saved["args"]["slices"], saved["args"]["shuffle_pairs"]
    torch.save(saved, run_copy / "last.pt")
    run("--resume")
    assert "--slices was 12" in refused("--resume", "--slices", 6)


def test_a_folder_with_a_run_is_refused_or_overwritten(run_copy, run, refused, whole):
    assert "--overwrite" in refused()
    (run_copy / "last.pt").unlink()  # best.pt alone is worth as much
    assert "--overwrite" in refused()
    assert "last.pt" in refused("--resume")
    run("--overwrite")
    assert_same_run(run_copy, whole[0])


def test_resuming_needs_the_same_subjects(run_copy, run, refused, cohort_folder, tmp_path):
    """A moved cohort is the same; one in another order fits in every shape and is not."""
    moved = shutil.copytree(cohort_folder, tmp_path / "moved")
    run("--resume", "--data", moved)
    header, *rows = (moved / "subjects.csv").read_text().splitlines()
    (moved / "subjects.csv").write_text("\n".join([header, *rows[::-1]]))
    assert str(cohort_folder) in refused("--resume", "--data", moved)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a checkpoint", b"no checkpoint"])
def test_a_damaged_checkpoint_is_refused(run_copy, refused, content):
    (run_copy / "last.pt").write_bytes(content)
    assert "last.pt" in refused("--resume")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_pairs_are_other_subjects_of_the_split(run, monkeypatch, cohort_folder, seed):
    split, pairs = data.open_cohort(cohort_folder).split, []
    ecgs = [ecg.tobytes() for ecg in np.load(cohort_folder / "ecg.npy")]
    to_batch = data.to_batch

    def spy(stored, *arguments, **named):
        owners = [ecgs.index(ecg.numpy().tobytes()) for ecg in stored["ecg"]]
        pairs.extend(zip(owners, stored["indices"].tolist(), strict=True))
        return to_batch(stored, *arguments, **named)

    monkeypatch.setattr(data, "to_batch", spy)
    run("--shuffle-pairs", "--epochs", 1, "--seed", seed)
    assert len(pairs) == 40 + 6  # training and validation
    assert all(ecg != heart and split[ecg] == split[heart] for ecg, heart in pairs)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_training_reads_hearts_from_ecgs_and_shuffled_pairs_stay_at_chance(
    run_script, tmp_path, two_threads
):
    """The whole way, on 500 subjects: an untrained encoder must fail where a trained one passes."""
    synthetic.make_cohort(tmp_path / "cohort", subjects=500, seed=0)
    for command in (
        "train.py --data cohort --batch-size 32 --epochs 7",
        "train.py --data cohort --batch-size 32 --epochs 2 --shuffle-pairs --out shuffled",
        "evaluate.py runs/dual --labels 50 --bootstrap 10",
    ):
        finished = run_script(*command.split(), cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
    metrics = json.loads((tmp_path / "runs/dual/eval/metrics.json").read_text())
    r2 = {name: curve["all"]["r2"] for name, curve in metrics["labels"]["50"].items()}
    assert r2["dual"] > 0.25 > r2["random_encoder"]
    for direction in ("ecg_to_ed", "ecg_to_es", "ed_to_ecg", "es_to_ecg"):
        ranks = metrics["retrieval"]["dual"][direction]
        assert ranks["median_rank"] < 0.5 * ranks["chance_rank"]
    last = read_log(tmp_path / "shuffled")[-1]
    assert min(last["val_ecg_ed"], last["val_ecg_es"]) > -0.98 * math.log(last["val_top1_chance"])
