"""What the ECG tells of the heart in the synthetic cohort, at most: python tests/calibrate.py

The supervised ECG encoder of evaluate.py on ten times more ECGs than the default cohort has,
against the published ceilings: LVM r 0.79 +- 0.05 (Khurshid 2021), LVEF R2 0.45 to 0.75, RVEF
clearly lower. The strength of the links in data.simulate_ecg is set by this, never by what a
method reaches. About ten minutes on two cores; run by hand.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data
import evaluate

SUBJECTS, SEED = 30_000, 0


def simulate(subject):
    """One ECG, cleaned as a file would be, and its heart; no CMR."""
    heart = data.draw_heart(SEED, subject)
    ecg_mv = data.simulate_ecg(heart, np.random.default_rng([SEED, subject, 2]))
    return {"heart": heart, **data.clean_ecg(ecg_mv, 500)}


def main():
    simulated = list(data.in_parallel(simulate, range(SUBJECTS), None, "simulating"))
    columns = {n: np.array([one["heart"][n] for one in simulated]) for n in data.PHENOTYPES}
    cohort = {"columns": columns, "phenotypes": data.PHENOTYPES, "outcomes": []}
    cohort["spacing_mm"] = data.SPACING_MM
    split = np.array([data.split_of(f"{subject:06d}") for subject in range(SUBJECTS)])
    rows = {name: np.flatnonzero(split == name) for name in data.SPLITS}
    with tempfile.TemporaryDirectory() as name:
        cohort["folder"] = Path(name)
        np.save(cohort["folder"] / "ecg.npy", np.stack([one["ecg"] for one in simulated]))
        outputs = evaluate.train_supervised(cohort, rows, torch.device("cpu"), SEED)["outputs"]
    x, once = evaluate.standardise(outputs, rows["train"]), np.ones((1, len(rows["test"])))
    sizes = f"{len(rows['train'])} training, {len(rows['test'])} test ECGs"
    print(f"| {sizes} | R² | r |\n|---|---|---|")
    for name, found in evaluate.probe(x, cohort, rows, once)["probe"].items():
        print(f"| {name} | {found['r2']:.3f} | {found['pearson']:.3f} |")


if __name__ == "__main__":
    main()
