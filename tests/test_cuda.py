"""Training, gradients and evaluation on a CUDA device, and what moves between it and the CPU."""

import json
import math

import numpy as np
import pytest
import test_loss
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device here: nothing ran on one"
)


@pytest.fixture
def without_tf32(monkeypatch):
    """Convolutions in full float32: by default cuDNN rounds their inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def script(run_script, cohort_folder, tmp_path):
    """script("train.py", "--amp", out="run") in this test's folder; it must end well."""

    def start(name, *more, out="run"):
        words = [out, "--bootstrap", 10]
        if name == "train.py":
            words = ["--data", cohort_folder, "--out", out, "--batch-size", 8, "--epochs", 3]
        finished = run_script(name, *words, *more, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        return finished

    return start


def load(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def probe_r2(folder):
    """All R² of metrics.json in its order."""
    probe = json.loads((folder / "eval" / "metrics.json").read_text())["probe"]
    return [entry["r2"] for table in probe.values() for entry in table.values() if "r2" in entry]


@pytest.mark.parametrize("more", [["--amp"], ["--no-amp"], ["--amp", "--micro-batch", 3], []])
def test_the_loss_falls(script, tmp_path, more):
    assert " on cuda" in script("train.py", "--device", "cuda", *more).stdout
    last = load(tmp_path / "run")
    assert last["args"]["amp"] == ("--no-amp" not in more)  # on by default
    totals = [row["total"] for row in last["log"]]
    assert all(map(math.isfinite, totals)) and totals[-1] < 0.95 * totals[0]


def test_the_first_epoch_is_that_of_the_cpu(script, tmp_path, without_tf32):
    """Augmentation included; later epochs drift apart by rounding."""
    script("train.py", "--device", "cuda", "--no-amp", out="cuda")
    script("train.py", "--device", "cpu", out="cpu")
    logs = [load(tmp_path / name)["log"] for name in ("cuda", "cpu")]
    assert logs[0][0]["total"] == pytest.approx(logs[1][0]["total"], rel=0.01)


@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_resume(script, tmp_path, devices):
    """After the first epoch of three, on the same device or the other one."""
    script("train.py", "--device", devices[0], "--no-amp", "--epochs", 1)
    saved = load(tmp_path / "run")
    saved["args"]["epochs"] = 3
    torch.save(saved, tmp_path / "run" / "last.pt")
    printed = script("train.py", "--device", devices[1], "--no-amp", "--resume").stdout
    assert f" on {devices[1]}" in printed and "epoch 1/3" not in printed
    assert math.isfinite(load(tmp_path / "run")["log"][2]["total"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("micro_batch", [1, 5, 24])
def test_gradients_are_those_of_one_plain_batch(dtype, tolerance, micro_batch, without_tf32):
    state = test_loss.global_batch(dtype, micro_batch, device="cuda")
    expected = test_loss.plain_batch(dtype, device="cuda")
    assert max(test_loss.errors(state, expected).values()) < tolerance


def test_two_processes_on_one_device_give_the_gradients_of_the_whole_batch(tmp_path):
    """By gloo, as nccl wants a device for each process."""
    torch.multiprocessing.spawn(test_loss.run_process, (2, tmp_path, "cuda:0"), nprocs=2)
    expected = test_loss.plain_batch(torch.float64, device="cuda")
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=False)[torch.float64, 5]
        assert max(test_loss.errors(state, expected).values()) < 1e-10


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs a device for each process")
def test_two_processes_by_nccl(script, start_script, cohort_folder, tmp_path):
    words = f"--data {cohort_folder} --out two --batch-size 8 --epochs 3 --no-amp".split()
    finished = start_script("train.py", *words, cwd=tmp_path, processes=2)
    assert finished.returncode == 0, finished.stderr
    script("train.py", "--no-amp", out="one")
    totals = [load(tmp_path / name)["log"][0]["total"] for name in ("two", "one")]
    assert totals[0] == pytest.approx(totals[1], rel=0.01)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_evaluation_is_the_same_on_both(script, tmp_path, monkeypatch, without_tf32, device):
    script("train.py", "--device", device)
    script("evaluate.py")
    on_cuda = probe_r2(tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # now evaluate.py takes the CPU
    script("evaluate.py")
    assert len(on_cuda) > 20 and probe_r2(tmp_path / "run") == pytest.approx(on_cuda, abs=0.01)


def test_prediction_is_the_same_on_both(script, tmp_path, cohort_folder, monkeypatch, without_tf32):
    np.save(tmp_path / "new.npy", np.load(cohort_folder / "ecg.npy")[0] / 1000)  # mV
    (tmp_path / "new.csv").write_text("id,ecg,ecg_hz\nA,new.npy,250\n")
    script("train.py", "--device", "cuda")
    values = []
    for _ in range(2):
        script("evaluate.py", "--predict", "new.csv")
        table = (tmp_path / "predictions.csv").read_text().splitlines()
        values.append([float(cell) for cell in table[1].split(",")[1:]])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # now on the CPU
    assert len(values[0]) >= 8 and values[0] == pytest.approx(values[1], rel=0.02)


def test_supervised_training_runs(script, tmp_path):
    script("train.py")
    script("evaluate.py", "--supervised")
    probe = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())["probe"]
    assert math.isfinite(probe["supervised"]["LVM_g"]["r2"])
