"""Freeze trained ECG encoders and measure, with linear probes, what they know of the heart.

    python evaluate.py runs/dual                      # writes runs/dual/eval/
    python evaluate.py runs/dual runs/ed2d --supervised --labels 50 100 250 500 all
    python evaluate.py runs/dual --predict new.csv    # phenotypes of new ECGs (columns id, ecg)

Probes are fitted on training subjects, their penalty is chosen on validation subjects, and test
subjects give the score with a 95 % bootstrap interval.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from cycler import cycler
from matplotlib.figure import Figure
from scipy import special, stats

import data
import loss
import models

ALPHAS = 10.0 ** np.arange(-1, 5.5, 0.5)  # penalties to choose from
GROUPS = ("structural", "functional", "all")  # of phenotypes
TOP_K = (1, 5, 10)  # recall@k
LIMITS = {"bootstrap": (1, 100_000), "seed": (0, 2**63 - 1)}
FEWEST_LABELS = 20  # in the label curve, and on validation for a prediction interval
LABEL_DRAWS = 10  # of n labels, in the label curve
SUPERVISED_DRAWS = 3  # fewer, as each trains an encoder
SUPERVISED_LR = 1e-3
CURVE_BASELINES = ("covariates", "random_encoder", "supervised")
# By baselines, and in features.npz: no run may have such a name.
TAKEN_NAMES = {"mean", *CURVE_BASELINES, "id", "split", "file"}
FIGURES = ("probe", "latents", "scatter", "views", "labels", "gallery")
# Safe for colour-blind readers (Okabe and Ito, but their yellow, which is faint on white).
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #7F6000 #000000 #999999".split()
COLORS_AND_MARKERS = cycler(color=COLORS, marker=list("osD^vP*X<"))

matplotlib.rcParams["text.parse_math"] = False  # two $ in a column's name are no formula


def note(text):
    """Progress and what is left out go to stderr: stdout holds results alone."""
    print(f"... {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- runs and their frozen features


@dataclass
class Run:
    """A trained model."""

    name: str
    folder: Path
    model: models.DualPhase
    cohort_folder: str  # that it was trained on
    fingerprint: str  # of that cohort


@dataclass
class Method:
    """What is probed: a named feature matrix.

    Kinds: "run", the ECG encoder of a run ("dual"); "latent", an image encoder of it ("dual.ed");
    "baseline", all else.
    """

    name: str  # key in metrics.json and features.npz
    kind: str
    run: str  # name of the run, "" for baselines
    features: np.ndarray  # (N, D)


def load_run(folder):
    """The best model of a run folder. Raises InputError where there is none or it is damaged."""
    path = Path(folder) / "best.pt"
    rule = "holds no trained run (no best.pt); train one with train.py"
    data.require(path.is_file(), folder, rule)
    saved = data.load_checkpoint(path)
    with data.reading(path):
        model = models.build(argparse.Namespace(**saved["args"]))
        model.load_state_dict(saved["model"])
        name = path.parent.resolve().name
        return Run(name, path.parent, model, saved["args"]["data"], saved["cohort"])


def choose_cohort(path, runs):
    """The cohort at path, else the first run's. Warns of runs that were trained on another one."""
    cohort = data.find_cohort(path or runs[0].cohort_folder)
    for run in runs:
        if run.fingerprint != cohort.fingerprint:
            text = f"warning: {run.folder} was trained on another cohort ({run.cohort_folder})"
            note(f"{text}; its training subjects may be test subjects here")
    return cohort


def frozen_features(model, cohort, names, device):
    """Features of all subjects {name: (N, D) array} from the inputs in `names` ("ecg", "ed", …)."""
    dataset = data.CohortDataset(cohort, names)
    batches = data.plain_batches(dataset, np.arange(len(cohort.ids)), device)
    features = models.extract_features(model.to(device), batches)
    for name, values in features.items():
        data.require(values.isfinite().all(), name, "features are not finite; train again")
    return {name: values.cpu().numpy() for name, values in features.items()}


def methods_of_run(run, features):
    """The ECG encoder, each latent, and ED and ES side by side, of features {name: (N, D)}."""
    methods = [Method(run.name, "run", run.name, features["ecg"])]
    for view in run.model.views:
        methods.append(Method(f"{run.name}.{view}", "latent", run.name, features[view]))
    if set(data.PHASES) <= set(run.model.views):
        both = np.hstack([features[phase] for phase in data.PHASES])
        methods.append(Method(f"{run.name}.{'+'.join(data.PHASES)}", "latent", run.name, both))
    return methods


@torch.no_grad()
def embed(run, features):
    """Features {name: (N, D)} -> unit vectors {name: (N, 128)}, on the CPU."""
    tensors = {name: torch.from_numpy(values) for name, values in features.items()}
    return run.model.cpu().embed(tensors)


def make_baselines(first, cohort, indices, args, device):
    """What runs must beat. first: the method that also stands beside the covariates."""
    matrices = {"mean": np.zeros((len(cohort.ids), 1))}  # on zeros, a probe learns the mean
    if cohort.covariates:
        covariates = np.column_stack([cohort.columns[name] for name in cohort.covariates])
        covariates = standardise(covariates, covariates[indices["train"]])
        covariates = np.nan_to_num(covariates)  # a missing one counts as the mean
        matrices["covariates"] = covariates
        matrices[f"covariates+{first.name}"] = np.hstack([covariates, first.features])
    torch.manual_seed(args.seed)
    untrained = models.build(argparse.Namespace(views=[], slices=data.GRID[0]))
    matrices["random_encoder"] = frozen_features(untrained, cohort, ("ecg",), device)["ecg"]
    if args.supervised:
        note("supervised training on all labels")
        matrices["supervised"] = train_supervised(cohort, indices, args.seed, device)
    return [Method(name, "baseline", "", matrix) for name, matrix in matrices.items()]


# ---------------------------------------------------------------- linear probes
# Written out: a page of NumPy in place of a dependency on scikit-learn.


def ridge(x, y, alphas):
    """Minimise |y - xw - b|² + alpha |w|²: weights (D + 1, alphas), the intercept b last.

    With centred x and y, w = (x'x + alpha)^-1 x'y. One x'x = V diag(e) V' serves all alphas, as
    then w = V diag(1 / (e + alpha)) V'x'y.
    """
    centred = x - x.mean(0)  # (n, D)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred)
    eigenvalues = eigenvalues.clip(0)[:, None]  # rounding can make them negative
    target = vectors.T @ (centred.T @ (y - y.mean()))[:, None]  # (D, 1)
    weights = vectors @ (target / (eigenvalues + alphas))  # (D, alphas)
    return np.vstack([weights, y.mean() - x.mean(0) @ weights])


def logistic(x, y, alphas):
    """Minimise the sum of log losses + alpha/2 |w|²: weights (D + 1, alphas), the intercept last.

    Newton's method, from strong to weak penalties, each starting where the last one ended.
    """
    x = np.column_stack([x, np.ones(len(x))])  # (n, D + 1)
    weights = np.zeros(x.shape[1])
    weights[-1] = special.logit(y.mean())
    solutions = np.empty((x.shape[1], len(alphas)))
    for k in np.argsort(-alphas):
        penalty = np.full(x.shape[1], alphas[k])
        penalty[-1] = 1e-9  # the intercept goes free
        for _ in range(30):
            p = special.expit(x @ weights)  # (n,)
            root = x * np.sqrt(p * (1 - p))[:, None]
            hessian = root.T @ root + np.diag(penalty)
            step = np.linalg.solve(hessian, x.T @ (p - y) + penalty * weights)
            largest = np.abs(step).max()
            weights = weights - step / max(1, largest)  # no weight moves by more than 1
            if largest < 1e-4:  # the error left is about its square
                break
        solutions[:, k] = weights
    return solutions


def standardise(x, reference):
    """x (N, D) with each column in spreads from the mean of its reference (n, D); nan stays nan."""
    known = np.ma.masked_invalid(reference)
    mean = known.mean(0, dtype=float).filled(0)
    std = known.std(0, dtype=float).filled(0)
    return (x - mean) / np.where(std > 1e-9, std, 1)


def labelled(y, indices):
    """Those of the indices whose label is known."""
    return indices[~np.isnan(y[indices])]


def can_be_probed(y, indices):
    """Whether each split knows 3 labels, and train and test more than one value of them."""
    known = {split: y[labelled(y, indices[split])] for split in data.SPLITS}
    enough = all(len(values) >= 3 for values in known.values())
    return enough and np.ptp(known["train"]) > 0 and np.ptp(known["test"]) > 0


def fit_probe(x, y, indices, binary):
    """Weights (D + 1,) by which standardised x (N, D) tells y (N,), nan where unknown; and alpha.

    Fitted on train. alpha has the lowest squared error, or log loss, on val.
    """
    train = labelled(y, indices["train"])
    val = labelled(y, indices["val"])
    solve = logistic if binary else ridge
    weights = solve(x[train], y[train], ALPHAS)
    outputs = x[val] @ weights[:-1] + weights[-1]  # (n_val, alphas)
    labels = y[val][:, None]  # (n_val, 1)
    if binary:
        errors = np.logaddexp(0, outputs) - labels * outputs
    else:
        errors = np.square(outputs - labels)
    best = errors.mean(0).argmin()
    return weights[:, best], ALPHAS[best]


def apply_probe(x, weights, binary):
    """Predictions (N,) by standardised x (N, D): values, or probabilities of a binary target."""
    outputs = x @ weights[:-1] + weights[-1]
    return special.expit(outputs) if binary else outputs


# ---------------------------------------------------------------- scores


@dataclass
class Scores:
    """What a probe reads from one feature matrix. Samples are scores on B resamples of test."""

    metrics: dict  # {target: {"r2" or "auroc", "r2_ci", …}}
    groups: dict  # {group: {"r2", "r2_ci"}}, the mean over its phenotypes
    samples: dict  # {target or group: (1 + B,)}, first the score on test itself
    predictions: dict  # {target: (N,)}


def bootstrap_counts(n, resamples, seed):
    """How often each of n test subjects counts (1 + B, n): once each, then as resampled.

    All methods are scored with the same counts, so that differences between them are paired.
    """
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.vstack([np.ones(n), drawn])


def r2_samples(y, prediction, train_mean, counts):
    """R² = 1 - Σ (y - p)² / Σ (y - train mean)² of test (n,) for each row of counts (1 + B, n)."""
    residual = counts @ np.square(y - prediction)  # (1 + B,)
    total = counts @ np.square(y - train_mean)
    with np.errstate(invalid="ignore"):  # nan for resamples without a known label
        return 1 - residual / total


def auroc_samples(y, score, counts):
    """Share of (positive, negative) pairs in the right order, for each row of counts (1 + B, n)."""
    positive = y == 1
    difference = score[positive][:, None] - score[~positive]  # (n+, n-)
    right = (np.sign(difference) + 1) / 2  # ties count half
    positive_counts = counts[:, positive]  # (1 + B, n+)
    negative_counts = counts[:, ~positive]  # (1 + B, n-)
    pairs = positive_counts.sum(1) * negative_counts.sum(1)  # (1 + B,)
    pairs_right = ((positive_counts @ right) * negative_counts).sum(1)
    with np.errstate(invalid="ignore"):  # nan for resamples of one class
        return pairs_right / pairs


def average_precision(y, score):
    """Area under the precision-recall curve: mean precision at each positive, ties together."""
    order = np.argsort(-score)
    last_of_tie = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = y[order].cumsum()[last_of_tie]
    precision = hits / (last_of_tie + 1)
    return (np.diff(hits, prepend=0) * precision).sum() / hits[-1]


def interval(samples):
    """95 % bootstrap interval [low, high]."""
    return np.nanpercentile(samples, [2.5, 97.5]).tolist()


def score(y, prediction, binary, train_mean, counts):
    """Metrics of a target on test (n,); its R² or AUROC for each row of counts (1 + B, n)."""
    if binary:
        samples = auroc_samples(y, prediction, counts)
        metrics = {"auroc": samples[0], "auroc_ci": interval(samples)}
        metrics["auprc"] = average_precision(y, prediction)
        metrics["prevalence"] = y.mean()
    else:
        samples = r2_samples(y, prediction, train_mean, counts)
        metrics = {"r2": samples[0], "r2_ci": interval(samples)}
        varies = np.ptp(prediction) > 0
        metrics["pearson"] = np.corrcoef(y, prediction)[0, 1] if varies else 0.0
        metrics["mae"] = np.abs(y - prediction).mean()
    return metrics, samples


def probe(x, cohort, indices, targets, counts):
    """Scores of standardised x (N, D) for those targets that have labels enough."""
    scores = Scores({}, {}, {}, {})
    for target in targets:
        y = cohort.columns[target]  # (N,)
        if not can_be_probed(y, indices):
            continue
        binary = target in cohort.outcomes
        weights, alpha = fit_probe(x, y, indices, binary)
        predictions = apply_probe(x, weights, binary)
        train_mean = y[labelled(y, indices["train"])].mean()
        known = ~np.isnan(y[indices["test"]])  # (n_test,)
        test = indices["test"][known]
        metrics, samples = score(y[test], predictions[test], binary, train_mean, counts[:, known])
        scores.metrics[target] = {**metrics, "n_test": len(test), "alpha": alpha}
        scores.samples[target] = samples
        scores.predictions[target] = predictions
    for group, names in group_phenotypes(cohort.phenotypes).items():
        group_samples = [scores.samples[name] for name in names if name in scores.samples]
        if group_samples:
            samples = np.mean(group_samples, axis=0)  # (1 + B,)
            scores.samples[group] = samples
            scores.groups[group] = {"r2": samples[0], "r2_ci": interval(samples)}
    return scores


def group_phenotypes(names):
    """{group: names}. Functional: stroke and end-systolic volume, EF, output, index, strain."""
    pattern = "(SVI?|EF|CO|CI|STRAIN|GLS|GCS|GRS)(_|$)"
    functional = [name for name in names if re.search(pattern, name.upper())]
    structural = [name for name in names if name not in functional]
    return {"structural": structural, "functional": functional, "all": names}


def compare(a, b):
    """a - b of two Scores for each target and group, and a / b - 1 for groups."""
    table = {}
    for name in a.samples:
        if name in b.samples:
            difference = a.samples[name] - b.samples[name]  # (1 + B,), on the same resamples
            table[name] = {"difference": difference[0], "ci": interval(difference)}
    for group in a.groups:
        # A ratio to what may be 0 means nothing.
        if group in b.groups and b.groups[group]["r2_ci"][0] > 0:
            relative = a.samples[group] / b.samples[group] - 1
            table[group]["relative"] = relative[0]
            table[group]["relative_ci"] = interval(relative)
    return table


def retrieval(embeddings, test):
    """{"ecg_to_ed": metrics, "ed_to_ecg": …}: how one view finds its partner in the test split."""
    directions = {}
    for pair in loss.present_pairs(embeddings):
        for a, b in (pair, pair[::-1]):
            ranks = loss.retrieval_ranks(embeddings[a][test], embeddings[b][test])
            directions[f"{a}_to_{b}"] = score_ranks(ranks.numpy())
    return directions


def score_ranks(ranks):
    """Median rank and recall@k of ranks (n,) among n, with exact 95 % intervals, beside chance."""
    n = len(ranks)
    metrics = {"n": n, "median_rank": np.median(ranks), "chance_rank": (n + 1) / 2}
    metrics["median_rank_ci"] = [1, n]  # fewer than 6 ranks bound their median no better
    if n >= 6:
        test_of_median = stats.quantile_test(ranks, p=0.5)  # the interval depends on p alone
        ends = test_of_median.confidence_interval(0.95)
        metrics["median_rank_ci"] = [int(ends.low), int(ends.high)]
    for k in TOP_K:
        hits = int((ranks <= k).sum())
        ends = stats.binomtest(hits, n).proportion_ci()  # a bootstrap of no hits would say [0, 0]
        metrics[f"recall@{k}"] = hits / n
        metrics[f"recall@{k}_ci"] = [ends.low, ends.high]
        metrics[f"chance@{k}"] = min(k / n, 1)
    return metrics


# ---------------------------------------------------------------- supervised training, few labels


def train_supervised(cohort, indices, seed, device):
    """The same ECG encoder trained from scratch on labels: a fair opponent of the frozen one.

    Augmented as in contrastive training, all targets at once, the last epoch. Returns its outputs
    (N, targets), which are then probed like features.
    """
    train = indices["train"]
    dataset = data.CohortDataset(cohort, ("ecg",))
    n_phenotypes = len(cohort.phenotypes)  # the first columns of the labels; outcomes stay 0 and 1
    labels = np.column_stack([cohort.columns[name] for name in cohort.phenotypes + cohort.outcomes])
    phenotypes = labels[:, :n_phenotypes]
    labels[:, :n_phenotypes] = standardise(phenotypes, phenotypes[train])
    labels = torch.from_numpy(labels).float().to(device)  # (N, targets)

    # Few labels need small batches and many epochs.
    batch_size = min(16 if len(train) < 800 else 32, len(train) // 2)
    epochs = int(np.clip(9_000 // len(train) + 8, 20, 48))
    keys = []
    for epoch in range(epochs):
        for batch_indices in data.epoch_batches(train, batch_size, seed, epoch):
            keys.append((epoch, batch_indices))

    torch.manual_seed(seed)
    readout = torch.nn.Linear(models.FEATURES, labels.shape[1])
    net = torch.nn.Sequential(models.ecg_encoder(), readout).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SUPERVISED_LR, len(keys))
    for stored in data.make_loader(dataset, keys):
        batch = data.to_batch(stored, device, seed)
        outputs = net(batch["ecg"])  # (B, targets)
        supervised_loss(outputs, labels[stored["indices"]], n_phenotypes).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    batches = data.plain_batches(dataset, np.arange(len(cohort.ids)), device)
    with torch.no_grad():
        return torch.cat([net(batch["ecg"]).cpu() for batch in batches]).numpy()


def supervised_loss(outputs, labels, n_phenotypes):
    """Squared error of the first columns, cross-entropy of the others: mean over known labels."""
    known = ~labels.isnan()  # (B, targets)
    labels = labels.nan_to_num()
    squares = (outputs - labels).square()
    entropies = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    losses = torch.cat([squares[:, :n_phenotypes], entropies[:, n_phenotypes:]], dim=1)
    return losses[known].sum() / known.sum().clamp(min=1)


def with_phenotype(cohort, indices):
    """Those of the indices of which at least one phenotype is known."""
    values = np.array([cohort.columns[name][indices] for name in cohort.phenotypes])
    return indices[~np.isnan(values).all(axis=0)]


def label_draws(cohort, indices, args):
    """Yield (count of labels, draw, splits) for each draw, "all" just once.

    The labels pay for validation, too: a fifth chooses alpha.
    """
    for count in args.labels:
        if count == "all":
            yield count, 0, indices
            continue
        n = int(count)
        candidates = with_phenotype(cohort, indices["train"])
        for draw in range(LABEL_DRAWS):
            rng = np.random.default_rng([args.seed, n, draw])
            drawn = rng.choice(candidates, n, replace=False)
            splits = {"train": drawn[n // 5 :], "val": drawn[: n // 5], "test": indices["test"]}
            yield count, draw, splits


def label_curve(methods, cohort, indices, args, device):
    """R² on test by number of labels: records {"labels", "draw", "method", "target", "r2"}.

    A target is a phenotype or a group of them. The draws are the same for all methods; supervised
    training starts anew on each.
    """
    records = []
    once = np.ones((1, len(indices["test"])))  # each test subject counts once: no bootstrap
    for count, draw, splits in label_draws(cohort, indices, args):
        for method in methods:
            features = method.features
            if method.name == "supervised" and count != "all":
                if draw >= SUPERVISED_DRAWS:
                    continue
                note(f"supervised training on {count} labels, draw {draw + 1}")
                features = train_supervised(cohort, splits, args.seed + draw, device)
            # By all training subjects: features that hardly vary among few would explode.
            x = standardise(features, features[indices["train"]])
            scores = probe(x, cohort, splits, cohort.phenotypes, once)
            record = {"labels": count, "draw": draw, "method": method.name}
            for target, samples in scores.samples.items():
                records.append({**record, "target": target, "r2": samples[0]})
    return records


def summarise_curve(records):
    """{labels: {method: {target: {"r2": mean over draws, "sd": their spread, "draws"}}}}."""
    values = defaultdict(list)
    for record in records:
        values[record["labels"], record["method"], record["target"]].append(record["r2"])
    curve = {}
    for (labels, method, target), r2 in values.items():
        table = curve.setdefault(labels, {}).setdefault(method, {})
        table[target] = {"r2": np.mean(r2), "sd": np.std(r2), "draws": len(r2)}
    return curve


# ---------------------------------------------------------------- prediction


def predict(run, cohort, indices, table_path, device):
    """Write predictions.csv: phenotypes and outcomes of new ECGs, listed by id and ecg."""
    path = table_path.with_name("predictions.csv")
    rule = "would be overwritten by the predictions; rename it"
    data.require(path.resolve() != table_path.resolve(), table_path, rule)
    rows = data.read_table(table_path, ("id", "ecg"))
    ids, ecgs = read_new_ecgs(rows, table_path, cohort.source.get("mains_hz", 50))

    # Encode them like the cohort's ECGs, on which probes are fitted.
    known = frozen_features(run.model, cohort, ("ecg",), device)["ecg"]  # (N, D)
    batches = [data.to_batch({"ecg": chunk}, device) for chunk in ecgs.split(128)]
    new = models.extract_features(run.model.to(device), batches)["ecg"].cpu().numpy()  # (n, D)
    reference = known[indices["train"]]
    x = standardise(known, reference)
    x_new = standardise(new, reference)

    columns = {}
    for target in cohort.phenotypes + cohort.outcomes:
        columns.update(predict_target(x, x_new, cohort, indices, target))
    lines = []
    for k, subject in enumerate(ids):
        cells = {name: f"{values[k]:.5g}" for name, values in columns.items()}
        lines.append({"id": subject, **cells})
    data.write_csv(path, ["id", *columns], lines)
    print(f"wrote {path}: {len(ids)} predicted, {len(rows) - len(ids)} rejected")
    print("Research use only, not for diagnosis.")


def read_new_ecgs(rows, table_path, mains_hz):
    """Ids and ECGs (n, 12, 2500) int16 µV of the rows that can be read; the others are named."""
    ids = []
    ecgs = []
    for row in rows:
        try:
            data.require(not row.problem, table_path, row.problem)
            data.require(row.cells["ecg"], table_path, f"line {row.line} names no ECG; fill it in")
            ecg, warnings = data.read_ecg(row.cells, table_path.parent, mains_hz)
        except data.InputError as error:
            note(f"{row.cells['id']} is left out: {error}")
            continue
        for warning in warnings:
            note(f"{row.cells['id']}: {warning}")
        ids.append(row.cells["id"])
        ecgs.append(torch.from_numpy(ecg))
    data.require(ids, table_path, "names no ECG that can be read; the reasons stand above")
    return ids, torch.stack(ecgs)


def predict_target(x, x_new, cohort, indices, target):
    """Columns {name: (n,)} for x_new (n, D) by a probe on the cohort's x (N, D); {} without one."""
    y = cohort.columns[target]  # (N,)
    if not can_be_probed(y, indices):
        note(f"{target}: too few labels or only one value, not predicted")
        return {}
    binary = target in cohort.outcomes
    weights, _ = fit_probe(x, y, indices, binary)
    predicted = apply_probe(x_new, weights, binary)
    if binary:
        return {f"{target}_probability": predicted}
    errors = np.abs(apply_probe(x, weights, binary) - y)
    half_width = conformal_half_width(errors, indices["val"])
    if half_width is None:
        note(f"{target}: no interval, as fewer than {FEWEST_LABELS} validation labels")
        return {target: predicted}
    low = predicted - half_width
    high = predicted + half_width
    return {target: predicted, f"{target}_low": low, f"{target}_high": high}


def conformal_half_width(errors, val):
    """Half the 95 % interval by absolute errors (N,) on val; None if too few.

    Split conformal (Papadopoulos 2002), a little too narrow, as val chose alpha and epoch, too.
    """
    residuals = errors[labelled(errors, val)]
    if len(residuals) < FEWEST_LABELS:
        return None
    level = min(1, 0.95 * (1 + 1 / len(residuals)))
    return np.quantile(residuals, level, method="higher")


# ---------------------------------------------------------------- metrics and tables


def collect_metrics(runs, methods, scores, embeddings, records, test):
    """All results as plain dictionaries: metrics.json. scores and embeddings: by name."""
    pairs = list(combinations([run.name for run in runs], 2))
    pairs += [(runs[0].name, method.name) for method in methods if method.kind == "baseline"]
    return {
        "probe": {name: one.metrics for name, one in scores.items()},
        "groups": {name: one.groups for name, one in scores.items()},
        "paired": {f"{a}-{b}": compare(scores[a], scores[b]) for a, b in pairs},
        "retrieval": {name: retrieval(vectors, test) for name, vectors in embeddings.items()},
        "labels": summarise_curve(records),
    }


def table_text(metrics, methods, cohort, indices):
    """table.md: all that a reader compares. metrics.json holds more."""
    phenotypes = cohort.phenotypes
    probes = metrics["probe"]
    from_ecg = {m.name: probes[m.name] for m in methods if m.kind != "latent"}
    latents = {m.name: probes[m.name] for m in methods if m.kind == "latent"}
    splits = ", ".join(f"{len(indices[split])} {split}" for split in data.SPLITS)
    text = f"{cohort.source['kind'].capitalize()} cohort ({splits} subjects). Scores are of test "
    text += "subjects, with 95 % intervals; R² is against the training mean.\n"
    text += table("mean R²", metrics["groups"], GROUPS, ".3f", "r2")
    text += table("difference in mean R²", metrics["paired"], GROUPS, "+.3f", "difference")
    text += table("relative difference", metrics["paired"], GROUPS, "+.1%", "relative")
    text += table("R² from ECG", from_ecg, phenotypes, ".2f", "r2")
    text += table("R² from latents", latents, phenotypes, ".2f", "r2")
    text += table("mean absolute error", from_ecg, phenotypes, ".3g", "mae")
    text += table("AUROC", from_ecg, cohort.outcomes, ".2f", "auroc")
    for labels, results in metrics["labels"].items():
        text += table(f"R², {labels} labels", results, [*GROUPS, *phenotypes], ".2f", "r2")
    columns = [f"{name}@{k}" for k in TOP_K for name in ("recall", "chance")]
    columns += ["median_rank", "chance_rank", "n"]
    for run, directions in metrics["retrieval"].items():
        text += table(f"retrieval by {run}", directions, columns, ".3g")
    return text


def table(title, results, columns, form, key=None):
    """Markdown of results {row: {column: {key: value}}}, or {row: {column: value}} without a key.

    Rows of which nothing is known are left out, and tables without rows.
    """
    header = [title, *[column.replace("|", "\\|") for column in columns]]
    lines = [f"\n| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row, entries in results.items():
        if key:
            cells = [cell(entries.get(column, {}), key, form) for column in columns]
        else:
            cells = [cell(entries, column, form) for column in columns]
        if set(cells) - {"-"}:
            lines.append(f"| {row.replace('|', '/')} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""]) if len(lines) > 2 else ""


def cell(entry, key, form):
    """0.71 [0.65, 0.76], or 0.53 ± 0.02 over draws, or - where entry lacks the key."""
    if key not in entry:
        return "-"
    text = format(entry[key], form)
    ci = entry.get("ci" if key == "difference" else f"{key}_ci")
    if ci:
        text += f" [{ci[0]:{form}}, {ci[1]:{form}}]"
    if entry.get("draws", 1) > 1:
        text += f" ± {entry['sd']:{form}}"
    return text


# ---------------------------------------------------------------- figures


def draw_figures(runs, methods, scores, embeddings, metrics, cohort, test):
    """{name: Figure} of all that there is to draw."""
    first = runs[0]
    probes = metrics["probe"]
    groups = group_phenotypes([name for name in cohort.phenotypes if name in probes[first.name]])
    phenotypes = groups["structural"] + groups["functional"]
    figures = {"gallery": draw_gallery(first, embeddings[first.name], cohort, test)}
    if not phenotypes:
        return figures
    from_ecg = {m.name: probes[m.name] for m in methods if m.kind != "latent" and m.name != "mean"}
    title = "What linear probes read from the ECG"
    xlabel = "phenotype (unit), structural ones first"
    ylabel = "R² on test subjects\n(95 % bootstrap interval)"
    figures["probe"] = draw_panels(title, {"": from_ecg}, phenotypes, xlabel, ylabel, cohort)
    of_first = {m.name: probes[m.name] for m in methods if m.run == first.name}
    title = f"What the ECG encoder of {first.name} and its image encoders know"
    figures["latents"] = draw_panels(title, {"": of_first}, phenotypes, xlabel, ylabel, cohort)
    figures["scatter"] = draw_scatter(first.name, scores[first.name], phenotypes, cohort, test)
    if len(runs) > 1:
        figures["views"] = draw_views(runs, metrics, cohort)
    if metrics["labels"]:
        figures["labels"] = draw_label_curve(metrics["labels"], first.name, cohort)
    return figures


def new_figure(title, cohort, height):
    """A figure as wide as the README, the kind of cohort in its title."""
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(f"{title} ({cohort.source['kind']} cohort)")
    return figure


def axis_label(name):
    """LVEF_pct -> LVEF (%)."""
    stem, _, unit = name.rpartition("_")
    unit = unit.replace("pct", "%")
    return f"{stem} ({unit})" if stem else name


def draw_scores(axis, results, names, width=0.8, line="none"):
    """R² with error bars of {label: {name: {"r2", "r2_ci" or "sd"}}}: labels side by side.

    Error bars are the 95 % interval, or the spread of draws.
    """
    axis.set_prop_cycle(COLORS_AND_MARKERS)
    step = width / len(results)
    for k, (label, entries) in enumerate(results.items()):
        shown = [name for name in names if name in entries]
        x = [names.index(name) - width / 2 + (k + 0.5) * step for name in shown]
        r2 = np.array([entries[name]["r2"] for name in shown])  # (n,)
        sd = np.array([entries[name].get("sd", 0) for name in shown])
        errors = np.array([sd, sd])  # (2, n), below and above
        if shown and "r2_ci" in entries[shown[0]]:
            errors = np.abs(np.array([entries[name]["r2_ci"] for name in shown]).T - r2)
        axis.errorbar(x, r2, errors, linestyle=line, label=label)
    for k in range(1, len(names)):
        axis.axvline(k - 0.5, color="lightgray", lw=0.8)
    axis.set_xticks(range(len(names)), [axis_label(name).replace(" ", "\n") for name in names])
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(axis="y", alpha=0.3)


def draw_panels(title, panels, names, xlabel, ylabel, cohort):
    """One panel of R² for each {title: {method: {name: …}}}, and a legend for all."""
    figure = new_figure(title, cohort, height=4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (panel_title, results) in zip(axes, panels.items(), strict=True):
        draw_scores(axis, results, names)
        axis.set_title(panel_title, fontsize=10)
        axis.set(xlabel=xlabel, ylabel=ylabel)
    handles, methods = axes[0].get_legend_handles_labels()
    figure.legend(handles, methods, frameon=False, ncols=5, loc="outside lower center")
    return figure


def draw_views(runs, metrics, cohort):
    """Mean structural and functional R² of the runs with all labels, and beside it with 100."""
    names = [run.name for run in runs]
    groups = metrics["groups"]
    panels = {"all labels, 95 % bootstrap interval": {name: groups[name] for name in names}}
    if "100" in metrics["labels"]:
        few = metrics["labels"]["100"]
        panels["100 labels, mean and spread of draws"] = {name: few.get(name, {}) for name in names}
    title = "What the ECG learns from each view of the heart"
    ylabel = "mean R² on test subjects"
    return draw_panels(title, panels, ["structural", "functional"], "phenotypes", ylabel, cohort)


def draw_label_curve(curve, run, cohort):
    """Mean R² over all phenotypes for each number of labels: one run against the baselines."""
    results = defaultdict(dict)
    for count, of_methods in curve.items():
        for method in (run, *CURVE_BASELINES):
            if "all" in of_methods.get(method, {}):
                results[method][count] = of_methods[method]["all"]
    figure = new_figure("How many labels it takes", cohort, height=4.2)
    axis = figure.subplots()
    draw_scores(axis, results, list(curve), width=0.2, line="-")
    axis.set_xlabel("labelled subjects, those of validation included")
    axis.set_ylabel("R² on test subjects, mean over phenotypes\n(mean and spread of draws)")
    axis.legend(frameon=False)
    return figure


def draw_scatter(run, scores, phenotypes, cohort, test):
    """Predicted against true phenotypes of test subjects, with the identity line."""
    lines = math.ceil(len(phenotypes) / 4)
    figure = new_figure(f"Test subjects, by {run}", cohort, height=2.5 * lines + 0.4)
    axes = figure.subplots(lines, 4, squeeze=False).ravel()
    for axis in axes[len(phenotypes) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, phenotypes, strict=False):
        y = cohort.columns[name][test]
        prediction = scores.predictions[name][test]
        axis.plot(y, prediction, ".", ms=3, color=COLORS[0])
        axis.axline((np.nanmean(y), np.nanmean(y)), slope=1, color="black", lw=1)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_xlabel(f"true {axis_label(name)}")
        axis.set_ylabel(f"predicted {axis_label(name)}")
        axis.set_title(f"R² {cell(scores.metrics[name], 'r2', '.2f')}", fontsize=10)
    return figure


def draw_gallery(run, embeddings, cohort, test):
    """Four test ECGs, their own hearts and the three hearts that each retrieves."""
    phases = run.model.inputs[1:]
    title = f"Hearts that ECGs retrieve by {run.name}, middle slice at {' | '.join(phases).upper()}"
    figure = new_figure(title, cohort, height=6.8)
    axes = figure.subplots(4, 5, width_ratios=(1.6, 1, 1, 1, 1))
    images = sum(embeddings[view][test] for view in run.model.views)  # (n, 128)
    similarity = embeddings["ecg"][test] @ images.T  # (n, n), summed over views
    captions = [name for name in ("LVEDV_ml", "LVEF_pct") if name in cohort.phenotypes]
    dataset = data.CohortDataset(cohort, run.model.inputs)
    queries = np.linspace(0, len(test) - 1, 4).astype(int)
    for row, query in zip(axes, queries, strict=True):
        nearest = similarity[query].argsort(descending=True)[:3].numpy()
        subjects = test[[query, *nearest]]
        batch = next(data.plain_batches(dataset, subjects))
        draw_leads(row[0], batch["ecg"][0].numpy())
        for k, axis in enumerate(row[1:]):
            middle = np.hstack([batch[phase][k, 0, data.GRID[0] // 2] for phase in phases])
            greys = np.round(middle * 16)  # few grey levels: noise does not compress
            axis.imshow(greys, cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            is_own = " (own)" if subjects[k] == subjects[0] else ""
            axis.set_title(f"retrieved {k}{is_own}" if k > 0 else "own heart", fontsize=9)
            values = [f"{axis_label(n)} {cohort.columns[n][subjects[k]]:.0f}" for n in captions]
            axis.set_xlabel("\n".join(values), fontsize=8)
    return figure


def draw_leads(axis, ecg_mv):
    """3 s of leads I, V2 and V5 of (12, 2500) mV, each below the lowest point of the one before."""
    seconds = np.arange(3 * data.SAMPLING_RATE_HZ) / data.SAMPLING_RATE_HZ
    baselines = {}
    top = 0.0
    for name in ("I", "V2", "V5"):
        lead = ecg_mv[data.LEADS.index(name), : len(seconds)]
        lead = lead + top - lead.max()
        axis.plot(seconds, lead, color="black", lw=0.6)
        baselines[name] = np.median(lead)
        top = lead.min() - 0.3
    axis.plot([3.1, 3.1], [top, top + 1], color="black", lw=2)  # 1 mV
    axis.set_yticks(list(baselines.values()), list(baselines))
    axis.set_xlabel("time (s); bar: 1 mV", fontsize=8)


# ---------------------------------------------------------------- command


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders; eval/ is written into the first")
    add("--data", metavar="PATH", help="cohort folder or manifest (default: of the first RUN)")
    add("--supervised", action="store_true", help="also train an ECG encoder on labels (no)")
    add("--labels", nargs="+", default=[], metavar="N", help="label curve: numbers or all (none)")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples of test (1000)")
    add("--seed", type=int, default=0, metavar="N", help="of all random draws (0)")
    add("--predict", metavar="CSV", help="only write predictions.csv for these new ECGs (no)")
    args = data.parse_arguments(parser, LIMITS)
    data.require(len(args.runs) == 1 or not args.predict, "--predict", "takes a single RUN")
    return args


def check_names(runs):
    """Refuse runs that could not be told apart in metrics.json."""
    names = [run.name for run in runs]
    for run in runs:
        names += [f"{run.name}.{view}" for view in run.model.views]
    unique = len(set(names)) == len(names) and not TAKEN_NAMES & set(names)
    data.require(unique, "RUN", "two folders, or one and a baseline, share a name; rename one")


def check_cohort(cohort, indices, args):
    """Refuse what the cohort is too small for."""
    taken = [name for name in cohort.phenotypes + cohort.outcomes if name in GROUPS]
    data.require(
        not taken, cohort.folder, f"has columns {taken}, as groups are called; rename them"
    )
    for split in data.SPLITS:
        n = len(indices[split])
        data.require(n >= 3, cohort.folder, f"has {n} {split} subjects; evaluation needs 3")
    if args.supervised or args.labels:
        data.require(cohort.phenotypes, cohort.folder, "has no phenotypes to learn")
        most = len(with_phenotype(cohort, indices["train"]))
    for count in args.labels:
        is_number = count.isascii() and count.isdecimal()
        allowed = count == "all" or (is_number and FEWEST_LABELS <= int(count) <= most)
        rule = f"{count} is neither all nor a number from {FEWEST_LABELS} to {most}"
        data.require(allowed, "--labels", f"{rule}, the training subjects with a phenotype")


def write_results(out, metrics, text, records, methods, cohort):
    """metrics.json, table.md, labels.csv and features.npz."""
    out.mkdir(exist_ok=True)
    json_text = json.dumps(metrics, indent=1, allow_nan=False)
    data.atomic_write(out / "metrics.json", lambda file: file.write(json_text.encode()))
    data.atomic_write(out / "table.md", lambda file: file.write(text.encode()))
    columns = ["labels", "draw", "method", "target", "r2"]
    data.write_csv(out / "labels.csv", columns, records)
    arrays = {method.name: method.features for method in methods}
    save = partial(np.savez, id=cohort.ids, split=cohort.split, **arrays)
    data.atomic_write(out / "features.npz", save)


def write_figures(out, figures):
    for name in FIGURES:  # those of an earlier evaluation may not stay
        (out / f"{name}.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        data.atomic_write(out / f"{name}.png", partial(figure.savefig, dpi=100, format="png"))


def main():
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [load_run(folder) for folder in args.runs]
    check_names(runs)
    cohort = choose_cohort(args.data, runs)
    indices = {split: cohort.indices(split) for split in data.SPLITS}
    check_cohort(cohort, indices, args)
    if args.predict:
        return predict(runs[0], cohort, indices, Path(args.predict), device)

    # Feature matrices of all that is probed
    methods = []
    embeddings = {}
    for run in runs:
        note(f"features of {run.name}")
        features = frozen_features(run.model, cohort, run.model.inputs, device)
        methods += methods_of_run(run, features)
        embeddings[run.name] = embed(run, features)
    methods += make_baselines(methods[0], cohort, indices, args, device)

    # Probes, of outcomes only from the ECG's side
    note("probes")
    counts = bootstrap_counts(len(indices["test"]), args.bootstrap, args.seed)
    scores = {}
    for method in methods:
        targets = cohort.phenotypes
        if method.kind != "latent":
            targets = cohort.phenotypes + cohort.outcomes
        x = standardise(method.features, method.features[indices["train"]])
        scores[method.name] = probe(x, cohort, indices, targets, counts)
    for target in cohort.phenotypes + cohort.outcomes:
        if target not in scores[runs[0].name].metrics:
            note(f"{target} is left out: too few labels in a split, or only one value")
    in_curve = [m for m in methods if m.kind == "run" or m.name in CURVE_BASELINES]
    records = label_curve(in_curve, cohort, indices, args, device)

    # Results
    metrics = collect_metrics(runs, methods, scores, embeddings, records, indices["test"])
    text = table_text(metrics, methods, cohort, indices)
    out = runs[0].folder / "eval"
    write_results(out, metrics, text, records, methods, cohort)
    figures = draw_figures(runs, methods, scores, embeddings, metrics, cohort, indices["test"])
    write_figures(out, figures)
    print(f"{text}\nwrote {out}")


if __name__ == "__main__":
    data.run_command(main)
