"""What the ECG tells of the heart in the synthetic cohort, at most: python tests/calibrate.py

The ECG encoder, trained supervised on ten times more ECGs than the default cohort has, against the
published ceilings: LVM r 0.79 +- 0.05 (Khurshid 2021), LVEF R2 0.45 to 0.75, RVEF clearly lower.
The strength of the links in data.simulate_ecg is set by this, never by what a method reaches.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data
import models

SUBJECTS, SEED, BATCH, EPOCHS, RATE = 30_000, 0, 64, 10, 3e-3


def simulate(subject):
    """One ECG, cleaned as a file would be, and its heart; no CMR."""
    heart = data.draw_heart(SEED, subject)
    ecg_mv = data.simulate_ecg(heart, np.random.default_rng([SEED, subject, 2]))
    return {"heart": heart, **data.clean_ecg(ecg_mv, 500)}


def main():
    simulated = list(data.in_parallel(simulate, range(SUBJECTS), None, "simulating"))
    ecg_uv = np.stack([one["ecg"] for one in simulated])
    y = np.array([[one["heart"][name] for name in data.PHENOTYPES] for one in simulated])
    split = np.array([data.split_of(f"{subject:06d}") for subject in range(SUBJECTS)])
    train, test = (np.flatnonzero(split == name) for name in ("train", "test"))
    mean, std = y[train].mean(0), y[train].std(0)
    target = torch.from_numpy(((y - mean) / std).astype(np.float32))

    def batch(rows):
        return {"ecg": torch.from_numpy(ecg_uv[rows].astype(np.float32) / 1000)}

    torch.manual_seed(SEED)
    net = torch.nn.Sequential(models.ecg_encoder(), torch.nn.Linear(models.FEATURES, y.shape[1]))
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for epoch in range(EPOCHS):
        for rows in data.epoch_batches(train, BATCH, SEED, epoch):
            ecg = data.augment(batch(rows), rows, SEED, epoch)["ecg"]
            (net(ecg) - target[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}", file=sys.stderr)
    with torch.no_grad():
        parts = np.array_split(test, 40)
        z = torch.cat([net.eval()(batch(rows)["ecg"]) for rows in parts]).numpy()
    print(f"| {len(train)} training, {len(test)} test ECGs | R² | r |\n|---|---|---|")
    for k, name in enumerate(data.PHENOTYPES):
        truth = target[test, k].numpy()
        r2 = 1 - np.square(z[:, k] - truth).sum() / np.square(truth).sum()
        print(f"| {name} | {r2:.3f} | {np.corrcoef(z[:, k], truth)[0, 1]:.3f} |")


if __name__ == "__main__":
    main()
