"""What if the CMR encoders were perfect? The most that one phase or two can teach the ECG here.

    python tests/ceiling.py

Trains train.py's defaults with --phases ed es, ed and es on the default synthetic cohort, but for
one thing: each CMR encoder gets the truth instead of a picture. ED is told LVEDV and RVEDV, ES
LVESV and RVESV, both LVM and how the heart lies in the chest, which ECGs show, too. Prints mean R2
of the frozen ECG encoder's linear probe over structural, functional and all phenotypes, and R2 of
LVEF with 100 labels. About two minutes on two cores; run by hand.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data
import evaluate
import models
import train

SHARED = ["LVM_g", "turn_deg", "tilt", "depth_mm"]
TRUTH = {"ed": ["LVEDV_ml", "RVEDV_ml", *SHARED], "es": ["LVESV_ml", "RVESV_ml", *SHARED]}


def perfect_encoder():
    """(B, 6) standardised numbers -> (B, 128)."""
    linear = torch.nn.Linear
    return torch.nn.Sequential(linear(6, 64), torch.nn.SiLU(), linear(64, models.FEATURES))


def main():
    cohort = data.find_cohort()
    hearts = [data.draw_heart(cohort["source"]["seed"], int(name)) for name in cohort["ids"]]
    truth = {}
    for phase, names in TRUTH.items():
        values = np.array([[heart[name] for name in names] for heart in hearts], np.float32)
        truth[phase] = torch.from_numpy((values - values.mean(0)) / values.std(0))
    read_batch = data.read_batch

    def read(cohort, rows, device="cpu", ecg_rows=None, names=("ecg", "ed", "es"), varied=None):
        told = {name: truth[name][rows].to(device) for name in names if name != "ecg"}
        return read_batch(cohort, rows, device, ecg_rows, ["ecg"], varied) | told

    rows = {name: np.flatnonzero(cohort["split"] == name) for name in data.SPLITS}
    print("| phases | structural | functional | all | LVEF, 100 labels |\n|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(models, "cmr_encoder", perfect_encoder),
        mock.patch.object(data, "read_batch", read),
    ):
        for phases in (["ed", "es"], ["ed"], ["es"]):
            out = Path(folder) / "-".join(phases)
            sys.argv = ["train.py", "--epochs", "12", "--out", str(out), "--phases", *phases]
            with contextlib.redirect_stdout(io.StringIO()):
                train.main()
            model = evaluate.load_run(out)["model"]
            frozen = evaluate.extract(model, cohort, torch.device("cpu"), ("ecg",))
            features = frozen["features"]["ecg"]
            x, once = evaluate.standardise(features, rows["train"]), np.ones((1, len(rows["test"])))
            found = evaluate.probe(x, cohort, rows, once, outcomes=False)
            scores = [found["groups"][name]["r2"] for name in ("structural", "functional")]
            scores.append(np.mean([score["r2"] for score in found["probe"].values()]))
            few = evaluate.label_curve({"ecg": features}, cohort, rows, ["100"], None, 0)
            scores.append(few["100"]["ecg"]["LVEF_pct"]["r2"])
            cells = [" ".join(phases), *(f"{r2:.3f}" for r2 in scores)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    data.exit_cleanly(main)
