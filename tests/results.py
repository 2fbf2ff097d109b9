"""All results of the README: python tests/results.py (about an hour on two cores).

For each seed, trains every run below, then evaluates all of them together, with supervised training
and few labels. What is there already is not made again, so that the command can be interrupted.
Prints Markdown tables. Intervals of differences are over seeds and test subjects.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (after the path is set)

import data  # noqa: E402
import evaluate  # noqa: E402
import synthetic  # noqa: E402

RUNS = {
    "dual": [],
    "2d_ed": ["--views", "ed", "--slices", "1"],
    "2d_joint": ["--views", "joint", "--slices", "1"],
    "3d_ed": ["--views", "ed"],
    "3d_es": ["--views", "es"],
    "3d_joint": ["--views", "joint"],
    "three": ["--views", "ed", "es", "joint"],
    "no_ed_es": ["--weights", "ed_es=0"],
}
CONTROL = ["--shuffle-pairs"]  # evaluated apart: its pairs are wrong on purpose
LABELS = ["50", "100", "250", "500", "all"]
DIFFERENCES = [  # a - b
    ("dual", "2d_ed"),
    ("dual", "2d_joint"),
    ("dual", "3d_ed"),
    ("dual", "3d_es"),
    ("dual", "3d_joint"),
    ("dual", "three"),
    ("three", "3d_joint"),
    ("dual", "no_ed_es"),
    ("dual", "supervised"),
    ("dual", "random_encoder"),
]
RESAMPLES = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--out", default="runs/results", help="folder (runs/results)")
    parser.add_argument("--data", help="cohort folder (default: that of train.py)")
    args = parser.parse_args()
    cohort = data.open_cohort(args.data) if args.data else synthetic.default_cohort()
    folders = [Path(args.out) / str(seed) for seed in args.seeds]
    for seed, folder in zip(args.seeds, folders, strict=True):
        make_runs(folder, seed, cohort)
    evals = [read_evaluation(folder) for folder in folders]
    print_scores(evals)
    print_differences(evals, cohort)
    print_few_labels(evals)
    print_latents(evals)
    print_retrieval(evals, folders)


def make_runs(folder, seed, cohort):
    """Train and evaluate all runs of a seed, those that are not there yet."""
    shared = ["--seed", str(seed), "--data", str(cohort.folder)]
    for name, options in {**RUNS, "shuffled": CONTROL}.items():
        run = folder / name
        if not (run / "ecg_encoder.pt").exists():  # written last
            restart = ["--overwrite"] if run.exists() else []
            execute("train.py", "--epochs", "12", *shared, "--out", run, *options, *restart)
    if not (folder / "dual" / "eval" / "probe.png").exists():
        runs = [folder / name for name in RUNS]
        execute("evaluate.py", *runs, *shared, "--supervised", "--labels", *LABELS)
    if not (folder / "shuffled" / "eval" / "probe.png").exists():
        execute("evaluate.py", folder / "shuffled", *shared)


def execute(script, *arguments):
    words = [str(word) for word in arguments]
    print("$", script, *words, file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / script), *words]
    subprocess.run(command, check=True, stdout=sys.stderr)


def read_evaluation(folder):
    """metrics.json, features.npz and labels.csv of a seed."""
    out = folder / "dual" / "eval"
    with open(out / "labels.csv", newline="") as file:
        records = list(csv.DictReader(file))
    return {
        "metrics": json.loads((out / "metrics.json").read_text()),
        "features": dict(np.load(out / "features.npz")),
        "records": records,
    }


def mean_and_spread(values):
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def print_table(title, columns, rows):
    """A Markdown table of rows [(name, cell, …), …]."""
    print(f"\n| {title} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_scores(evals):
    """Structural and functional R² with all labels, and function with 100."""
    columns = ["structural", "functional", "all"]
    rows = []
    for method in evals[0]["metrics"]["groups"]:
        if "." in method:
            continue
        cells = []
        for group in columns:
            values = [one["metrics"]["groups"][method][group]["r2"] for one in evals]
            cells.append(mean_and_spread(values))
        for target in ("functional", "LVEF_pct"):
            values = label_scores(evals, "100", method, target)
            cells.append(mean_and_spread(values) if values else "-")
        rows.append((method, *cells))
    titles = [*columns, "functional, 100 labels", "LVEF, 100 labels"]
    print_table("R² on test, mean ± SD over seeds", titles, rows)


def label_scores(evals, labels, method, target):
    """Mean over draws, of each seed; nothing if the method is not in the label curve."""
    tables = [one["metrics"]["labels"][labels].get(method) for one in evals]
    return [table[target]["r2"] for table in tables if table]


def print_differences(evals, cohort):
    """a - b of group means, averaged over seeds, with intervals over seeds and test subjects."""
    samples = [bootstrap_samples(one["features"], cohort) for one in evals]
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(evals), size=(RESAMPLES, len(evals)))  # seeds of each resample
    rows = []
    for a, b in DIFFERENCES:
        cells = []
        for group in ("structural", "functional"):
            differences = np.stack([one[a][group] - one[b][group] for one in samples])
            resampled = differences[chosen, np.arange(1, RESAMPLES + 1)[:, None]].mean(axis=1)
            relative = np.mean([one[a][group][0] / one[b][group][0] - 1 for one in samples])
            cells.append(f"{with_interval(differences[:, 0].mean(), resampled)}, {relative:+.1%}")
        for target in ("functional", "LVEF_pct"):
            cells.append(label_difference(evals, "100", a, b, target))
        rows.append((f"{a} - {b}", *cells))
    titles = ["structural", "functional", "functional, 100 labels", "LVEF, 100 labels"]
    print_table("difference in R² [95 % interval], relative", titles, rows)


def with_interval(value, resampled):
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def bootstrap_samples(features, cohort):
    """{method: {group: R² (1 + B,)}}: on test, then on resamples, the same for all seeds."""
    assert (features["id"] == cohort.ids).all()
    indices = {split: cohort.indices(split) for split in data.SPLITS}
    counts = evaluate.bootstrap_counts(len(indices["test"]), RESAMPLES, seed=0)
    samples = {}
    for method in {name for pair in DIFFERENCES for name in pair}:
        x = evaluate.standardise(features[method], features[method][indices["train"]])
        scores = evaluate.probe(x, cohort, indices, cohort.phenotypes, counts)
        samples[method] = scores.samples
    return samples


def label_difference(evals, labels, a, b, target):
    """a - b over the draws of labels that both have, with an interval over seeds and draws."""
    differences = []
    for one in evals:
        r2 = {}
        for record in one["records"]:
            if record["labels"] == labels and record["target"] == target:
                r2[record["method"], record["draw"]] = float(record["r2"])
        draws = [draw for method, draw in r2 if method == b and (a, draw) in r2]
        differences.append([r2[a, draw] - r2[b, draw] for draw in draws])
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        seeds = rng.integers(len(evals), size=len(evals))
        resampled.append(np.mean([rng.choice(differences[s], len(differences[s])) for s in seeds]))
    return with_interval(np.mean(differences), resampled)


def print_few_labels(evals):
    """Mean R² over phenotypes by number of labels."""
    rows = []
    for method in evals[0]["metrics"]["labels"]["100"]:
        cells = [mean_and_spread(label_scores(evals, n, method, "all")) for n in LABELS]
        rows.append((method, *cells))
    print_table("mean R² over phenotypes by labels", LABELS, rows)
    rows = []
    for other in ("supervised", "random_encoder", "covariates"):
        cells = [label_difference(evals, n, "dual", other, "all") for n in LABELS]
        rows.append((f"dual - {other}", *cells))
    print_table("difference [95 % interval]", LABELS, rows)


def print_latents(evals):
    """What the image encoders' latents know."""
    rows = []
    for method in evals[0]["metrics"]["groups"]:
        if "." in method:
            tables = [one["metrics"]["groups"][method] for one in evals]
            groups = ("structural", "functional")
            cells = [mean_and_spread([table[g]["r2"] for table in tables]) for g in groups]
            rows.append((method, *cells))
    print_table("R² from latents", ["structural", "functional"], rows)


def print_retrieval(evals, folders):
    """Recall and median rank over the whole test split: the runs, and the negative control."""
    controls = []
    for folder in folders:
        path = folder / "shuffled" / "eval" / "metrics.json"
        controls.append(json.loads(path.read_text())["retrieval"]["shuffled"])
    rows = []
    for name in ("dual", "shuffled"):
        seeds = [one["metrics"]["retrieval"]["dual"] for one in evals]
        seeds = seeds if name == "dual" else controls
        for direction in seeds[0]:
            entries = [seed[direction] for seed in seeds]
            cells = [mean_and_spread([entry["recall@10"] for entry in entries])]
            cells.append(f"{entries[0]['chance@10']:.3f}")
            cells.append(" ".join(f"{entry['median_rank']:g}" for entry in entries))
            cells.append(f"{entries[0]['chance_rank']:g}")
            rows.append((f"{name}, {direction}", *cells))
    titles = ["recall@10", "chance", "median rank of each seed", "chance"]
    print_table("retrieval", titles, rows)


if __name__ == "__main__":
    data.run_command(main)
