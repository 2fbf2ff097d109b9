"""Freeze a trained ECG encoder and ask what it knows of the heart.

    python evaluate.py runs/dual                     # probe, retrieval; writes runs/dual/eval/
    python evaluate.py runs/dual runs/ed runs/es --supervised --labels 50 100 250 500 1000 all
    python evaluate.py runs/dual --predict new.csv   # phenotypes of new ECGs (columns id, ecg)

Probes are linear: ridge for phenotypes, L2 logistic regression for outcomes, on the features before
the head, standardised on training subjects. Their strength alpha is chosen on validation subjects;
test subjects give the score, with a bootstrap over them for 95 % intervals.
"""

import argparse
import copy
import json
import re
import sys
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import special, stats

import data
import loss
import models

ALPHAS = 10.0 ** np.arange(-1, 5.5, 0.5)
RATES = (1e-3, 3e-3)  # learning rates among which the supervised opponent chooses
DIRECTIONS = ("ecg_to_ed", "ecg_to_es", "ed_to_ecg", "es_to_ecg", "ed_to_es")
FIGURES = ("probe", "latents", "scatter", "labels", "gallery")
matplotlib.rcParams["text.parse_math"] = False  # two $ in a name are no formula
# Safe for colour-blind readers (Okabe, Ito), for nine methods.
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #999999 #000000 #F0E442".split()


def tell(text):
    """Progress and what is left out go to stderr, so that stdout holds results alone."""
    print(f"... {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- frozen features


def load_run(folder):
    """A run folder's best model: dict(name, folder, model, args, cohort (fingerprint), grid)."""
    path = Path(folder) / "best.pt"
    why = "holds no trained run (no best.pt); train one with train.py"
    data.require(path.is_file(), folder, why)
    why = "is damaged or not of this code's architecture ({error.__class__.__name__}); train again"
    with data.explain(path, why), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no foreign code
        model = models.DualPhase(saved["args"]["phases"])
        model.load_state_dict(saved["model"])
        run = {"args": saved["args"], "cohort": saved["cohort"], "grid": saved.get("grid")}
    return run | {"name": path.parent.resolve().name, "folder": path.parent, "model": model}


def choose_cohort(path, runs):
    """The cohort to evaluate on; one that has another grid than a run was trained on is refused."""
    wanted = path or runs[0]["args"]["data"]
    why = f"was trained on {wanted}, which is not here; name a cohort with --data"
    data.require(path or Path(wanted).exists(), runs[0]["folder"], why)
    cohort = data.find_cohort(wanted)
    for run in runs:
        grid, own = [*(run["grid"] or cohort["grid"])], [*cohort["grid"]]
        why = f"has a grid of {own} voxels but {run['folder']} was trained on {grid}"
        data.require(grid == own, cohort["folder"], f"{why}; prepare it with --grid")
        if run["cohort"] != cohort["fingerprint"]:
            former = run["args"]["data"]
            tell(f"{run['folder']} was trained on another cohort ({former}) or an older")
            tell(f"state of it; its training subjects may be test subjects of {cohort['folder']}")
    return cohort


def batches(cohort, rows, device, names):
    """Batches of at most 128 rows, without augmentation, read ahead."""
    parts = np.array_split(rows, max(1, -(-len(rows) // 128)))
    return data.read_ahead(partial(data.read_batch, cohort, device=device, names=names), parts)


@torch.no_grad()
def extract(model, cohort, device, names=("ecg", "ed", "es")):
    """Every subject seen by a frozen model: dict(features, embeddings), each {name: (N, 128)}.

    names: what is read of each subject. Features are numpy arrays, embeddings tensors on the CPU.
    Frozen means frozen: a parameter or buffer that changes meanwhile is an error.
    """
    model = model.to(device).eval()  # in training mode, batch statistics would drift
    before = copy.deepcopy(model.state_dict())
    names = [name for name in names if name in model.encoders]  # others would be read for nothing
    count = len(cohort["ids"])
    stream = batches(cohort, np.arange(count), device, names)
    features = models.encode_all(model, stream, count)
    embeddings = {name: x.cpu() for name, x in model.embed(features).items()}
    if any(not torch.equal(before[key], value) for key, value in model.state_dict().items()):
        raise RuntimeError("the frozen encoder changed while features were extracted")
    finite = all(x.isfinite().all() for x in features.values())
    data.require(finite, "best.pt", "gives features that are not finite; train again")
    arrays = {name: x.cpu().numpy() for name, x in features.items()}
    return {"features": arrays, "embeddings": embeddings}


# ---------------------------------------------------------------- probes and scores


def ridge(x, y, alphas):
    """Weights and intercept, last, (D + 1, alphas), of the least squares + alpha |w|^2.

    w = (X'X + alpha I)^-1 X'y with X and y centred, for which one eigh serves all alphas.
    """
    center = x.mean(0)
    values, vectors = np.linalg.eigh((x - center).T @ (x - center))
    target = vectors.T @ ((x - center).T @ (y - y.mean()))
    weights = vectors @ (target[:, None] / (values.clip(0)[:, None] + alphas))
    return np.vstack([weights, y.mean() - center @ weights])


def logistic(x, y, alphas):
    """Weights, intercept last, (D + 1, alphas), of the least sum of log losses + alpha/2 |w|^2.

    Newton's method, from strong to weak alphas, each starting where the last one ended.
    """
    x, found = np.column_stack([x, np.ones(len(x))]), {}
    weights = np.append(np.zeros(x.shape[1] - 1), special.logit(y.mean()))
    for alpha in sorted(alphas, reverse=True):
        penalty = np.append(np.full(x.shape[1] - 1, alpha), 1e-9)  # the intercept goes free
        for _ in range(30):
            p = special.expit(x @ weights)
            half = x * np.sqrt(p * (1 - p))[:, None]
            slope, curve = x.T @ (p - y) + penalty * weights, half.T @ half + np.diag(penalty)
            step = np.linalg.solve(curve, slope)
            weights = weights - step / max(1, np.abs(step).max())  # none moves by more than 1
            if np.abs(step).max() < 1e-4:  # the error left is about its square
                break
        found[alpha] = weights
    return np.stack([found[alpha] for alpha in alphas], 1)


def standardise(x, train):
    """Zero mean and unit spread over the training split, labelled or not, as ECGs are known there.

    Over a few labelled subjects alone, features that are nearly constant among them would explode.
    """
    if len(train) == 0:
        return x
    mean, std = x[train].mean(0, dtype=float), x[train].std(0, dtype=float)
    return (x - mean) / np.where(std > 1e-9, std, 1)


def fit(x, y, rows, binary):
    """Probe standardised x (N, D) for y (N,), nan where unknown: looks at train and val alone.

    Returns dict(prediction (N,), in y's unit or a probability; alpha, best on val by squared error
    or log loss (100 without val); mean of y on train), or None with fewer than 3 training labels or
    a single value of them.
    """
    train, val = (rows[name][~np.isnan(y[rows[name]])] for name in ("train", "val"))
    if len(train) < 3 or np.ptp(y[train]) == 0:
        return None
    weights = (logistic if binary else ridge)(x[train], y[train], ALPHAS)
    z = x @ weights[:-1] + weights[-1]  # (N, alphas)
    errors = np.square(z[val] - y[val, None])
    if binary:
        errors = np.logaddexp(0, z[val] * (1 - 2 * y[val, None]))
    best = int(errors.mean(0).argmin()) if len(val) else len(ALPHAS) // 2  # 100: a medium choice
    prediction = special.expit(z[:, best]) if binary else z[:, best]
    return {"prediction": prediction, "alpha": float(ALPHAS[best]), "mean": y[train].mean()}


def resamples(n, count, seed):
    """How often each of n subjects counts, (1 + count, n): once each, then bootstrap samples."""
    if n == 0:
        return np.ones((1 + count, 0))
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=count)
    return np.vstack([np.ones(n), drawn])


def r2(y, prediction, mean, counts):
    """R^2 against the training mean per row of counts: 1 - sum (y - p)^2 / sum (y - mean)^2."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - counts @ np.square(y - prediction) / (counts @ np.square(y - mean))


def auroc(y, score, counts):
    """Area under the ROC curve per row of counts, ties counted half; nan without both classes."""
    order = np.argsort(score)
    ties = np.flatnonzero(np.append(True, np.diff(score[order]) != 0))  # where each level begins
    weights = (counts[:, order] * (y[order] == k) for k in (1, 0))
    positive, negative = (np.add.reduceat(weight, ties, axis=1) for weight in weights)
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def average_precision(y, score):
    """Area under the precision-recall curve: mean precision at each positive, ties together."""
    order = np.argsort(-score)
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = y[order].cumsum()[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def summary(samples, name, interval="{}_ci"):
    """Row 0 of samples is the value itself: {name: value, name_ci: 95 % bootstrap interval}."""
    ci = [float(end) for end in np.nanpercentile(samples, [2.5, 97.5])]
    return {name: float(samples[0]), interval.format(name): ci}


def groups(names):
    """Phenotypes of size and of contraction (stroke and end-systolic volumes, EF), by name."""
    functional = [n for n in names if re.search(r"(SV|EF|CO|STRAIN)(_|$)", n.upper())]
    return {"structural": [n for n in names if n not in functional], "functional": functional}


def probe(x, cohort, rows, counts, outcomes=True):
    """Probe every target from standardised x (N, D); counts (samples, test) of resamples.

    outcomes: whether they are probed, too, not phenotypes alone.
    Returns metrics under "probe", "groups" (mean R^2) and "outcomes", and per target its "samples"
    and "predictions". Targets without labels enough to fit or to score are left out.
    """
    result = {"probe": {}, "groups": {}, "outcomes": {}, "samples": {}, "predictions": {}}
    for target in cohort["phenotypes"] + cohort["outcomes"] * outcomes:
        y, binary = cohort["columns"][target], target in cohort["outcomes"]
        known = ~np.isnan(y[rows["test"]])
        test, found = rows["test"][known], fit(x, y, rows, binary)
        if found is None or len(test) < 3 or np.ptp(y[test]) == 0:
            continue
        truth, p, about = y[test], found["prediction"][test], {"n_test": len(test)}
        if binary:
            samples = auroc(truth, p, counts[:, known])
            about |= {"auprc": average_precision(truth, p), "prevalence": float(truth.mean())}
        else:
            samples = r2(truth, p, found["mean"], counts[:, known])
            about["pearson"] = float(np.corrcoef(truth, p)[0, 1]) if np.ptp(p) > 0 else 0.0
            about["mae"] = float(np.abs(truth - p).mean())
        about |= summary(samples, "auroc" if binary else "r2") | {"alpha": found["alpha"]}
        result["outcomes" if binary else "probe"][target] = about
        result["samples"][target], result["predictions"][target] = samples, found["prediction"]
    for group, names in groups(result["probe"]).items():
        if names:
            result["samples"][group] = sum(result["samples"][name] for name in names) / len(names)
            result["groups"][group] = summary(result["samples"][group], "r2")
    return result


def compare(a, b):
    """Two probes on the same resampled test subjects: a - b per target, a / b - 1 per group."""

    def table(kind, name, change):
        pairs = {k: (a["samples"][k], b["samples"][k]) for k in a[kind] if k in b[kind]}
        if name == "relative":  # a ratio to what may be 0 means nothing
            pairs = {k: pair for k, pair in pairs.items() if np.nanpercentile(pair[1], 2.5) > 0}
        return {k: summary(change(*pair), name, "ci") for k, pair in pairs.items()}

    return {
        "paired": table("probe", "delta_r2", np.subtract),
        "paired_outcomes": table("outcomes", "delta_auroc", np.subtract),
        "relative": table("groups", "relative", lambda own, other: own / other - 1),
    }


def retrieval(embeddings, rows):
    """recall@k, median rank and 95 % intervals over the whole test split, for every direction.

    embeddings: {name: (N, D) unit vectors}; rows: those of test. Returns {direction: dict}, without
    the directions of a phase that is not there; nothing for fewer than 2 subjects.
    """
    result, n = {}, len(rows)
    for direction in DIRECTIONS:
        query, target = direction.split("_to_")
        if query in embeddings and target in embeddings and n > 1:
            ranks = loss.retrieval_ranks(embeddings[query][rows], embeddings[target][rows])
            ranks = np.sort(ranks.numpy())
            low, high = stats.binom.ppf([0.025, 0.975], n, 0.5).astype(int)  # of order statistics
            found = {"median_rank": float(np.median(ranks)), "chance_rank": (n + 1) / 2, "n": n}
            found["median_rank_ci"] = [int(ranks[max(low - 1, 0)]), int(ranks[min(high, n - 1)])]
            for k in (1, 5, 10):  # exact intervals: a bootstrap without any hit would say [0, 0]
                hits = int((ranks <= k).sum())
                found |= {f"recall@{k}": hits / n, f"chance@{k}": min(k / n, 1.0)}
                found[f"recall@{k}_ci"] = [*stats.binomtest(hits, n).proportion_ci()]
            result[direction] = found
    return result


# ---------------------------------------------------------------- supervised opponent, few labels


def train_supervised(cohort, rows, device, seed, rates=RATES):
    """The same ECG encoder trained from scratch on the labels: a fair opponent of the frozen one.

    One linear output per target on standardised values (cross-entropy for outcomes), all targets at
    once, augmented as in training; learning rate and epoch by validation loss. Its outputs, for
    which it was trained, are then probed like features. Returns dict(outputs (N, targets), rate).
    """
    targets, train, val = cohort["phenotypes"] + cohort["outcomes"], rows["train"], rows["val"]
    y = np.stack([cohort["columns"][name] for name in targets], 1)
    binary = np.array([name in cohort["outcomes"] for name in targets])
    labels = np.ma.masked_invalid(y[train])
    mean, std = labels.mean(0).filled(0), labels.std(0).filled(0)
    varies = std > 1e-9 * np.abs(mean)  # others would rule the choice on val with huge errors
    scaled = np.where(binary, y, (y - mean) / np.where(varies, std, 1))
    y = torch.from_numpy(np.where(varies, scaled, np.nan).astype(np.float32)).to(device)
    outcome = torch.from_numpy(binary).to(device)

    def error(output, wanted):  # mean over the labels that are known
        known, wanted = ~wanted.isnan(), wanted.nan_to_num()
        entropy = F.binary_cross_entropy_with_logits(output, wanted, reduction="none")
        each = torch.where(outcome, entropy, (output - wanted).square())
        return each[known].sum() / known.sum().clamp(min=1)

    def load(rows, epoch):
        batch = data.read_batch(cohort, rows, device, names=("ecg",), varied=(seed, epoch))
        return batch["ecg"], y[rows]

    @torch.no_grad()
    def outputs(net, rows):
        heard = batches(cohort, rows, device, ("ecg",))
        return torch.cat([net.eval()(batch["ecg"]) for batch in heard])

    best, size = {"error": np.inf}, min(16 if len(train) < 800 else 32, len(train) // 2)
    epochs = int(np.clip(9_000 // len(train) + 8, 14, 48))
    for rate in rates:
        torch.manual_seed(seed)
        encoder, readout = models.ecg_encoder(), torch.nn.Linear(models.FEATURES, len(targets))
        net = torch.nn.Sequential(encoder, readout).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
        steps = epochs * (len(train) // size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
        for epoch in range(epochs):
            parts = data.epoch_batches(train, size, seed, epoch)
            for ecg, wanted in data.read_ahead(partial(load, epoch=epoch), parts):
                error(net.train()(ecg), wanted).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            score = float(error(outputs(net, val), y[val]))
            if score <= best["error"]:  # without labels in val, the last epoch
                best = {"error": score, "rate": rate, "net": copy.deepcopy(net)}
    return {"outputs": outputs(best["net"], np.arange(len(y))).cpu().numpy(), "rate": best["rate"]}


def labelled(cohort, rows):
    """Those of rows of which at least one phenotype is known."""
    values = [cohort["columns"][name][rows] for name in cohort["phenotypes"]]
    return rows[~np.isnan(values).all(axis=0)] if values else rows[:0]


def draw_labels(train, count, seed):
    """A budget of count labels pays for validation too: a fifth chooses, the rest is fitted."""
    picked = np.random.default_rng(seed).choice(train, count, replace=False)
    return {"train": picked[count // 5 :], "val": picked[: count // 5]}


def label_curve(encoders, cohort, rows, counts, device, seed):
    """R^2 on test against the number of labels: {n: {method: {phenotype: dict(r2, sd, draws)}}}.

    encoders: {method: features (N, D)}. Mean and spread of 10 draws of n labels, or 3 for the
    supervised encoder, trained anew on each. "all": the whole training and validation splits.
    """
    curve, one, known = {}, np.ones((1, len(rows["test"]))), labelled(cohort, rows["train"])
    for count in counts:
        scores, rates = {}, RATES
        for draw in range(1 if count == "all" else 10):
            chosen, features = rows, dict(encoders)
            if count != "all":
                chosen = rows | draw_labels(known, int(count), [seed, int(count), draw])
                if features.pop("supervised", None) is not None and draw < 3:
                    tell(f"supervised on {count} labels, draw {draw + 1} of 3")
                    best = train_supervised(cohort, chosen, device, seed + draw, rates)
                    features["supervised"] = best["outputs"]
                    rates = (best["rate"],)  # chosen on the first draw
            for method, x in features.items():
                x = standardise(x, rows["train"])
                for target, found in probe(x, cohort, chosen, one, outcomes=False)["probe"].items():
                    scores.setdefault((method, target), []).append(found["r2"])
        table = curve[str(count)] = {}
        for (method, target), r in scores.items():
            found = {"r2": float(np.mean(r)), "sd": float(np.std(r)), "draws": len(r)}
            table.setdefault(method, {})[target] = found
    return curve


# ---------------------------------------------------------------- prediction


def encode_row(run, table, mains_hz, device, row):
    """Features (1, D) of one listed ECG, or the reason why not; never raises, as others go on."""
    path = Path(table).parent / row["ecg"]
    try:
        data.require("wrong" not in row, table, row.get("wrong"))
        data.require(row["ecg"], table, "names no ECG; fill it in")
        ecg = data.read_clean_ecg(path, mains_hz)
    except Exception as error:  # one file that breaks a reader must not stop the others
        why = data.printable(getattr(error, "why", error))
        return {"id": row["id"], "file": getattr(error, "where", path), "reason": why}
    batch = data.as_batch({"ecg": torch.from_numpy(ecg["ecg"][None]).to(device)})
    with torch.no_grad():
        features = run["model"](batch)["ecg"].cpu().numpy()
    return {"row": {"id": row["id"], "features": features}, "warnings": ecg["warnings"]}


def predict(run, cohort, rows, table, device):
    """Phenotypes and outcomes of new ECGs: the frozen encoder, probes fitted on the cohort.

    Writes predictions.csv beside the table of ids and ECGs. The 95 % interval of a phenotype is the
    prediction +- the 95 % quantile of absolute validation residuals (split conformal).
    """
    listed, out = data.read_table(table, ("id", "ecg")), Path(table).with_name("predictions.csv")
    why = "would be overwritten by the predictions; rename it"
    data.require(out.resolve() != Path(table).resolve(), table, why)
    known = extract(run["model"], cohort, device, ("ecg",))["features"]["ecg"]
    mains_hz = cohort["source"].get("mains_hz", 50)
    made = data.collect((encode_row(run, table, mains_hz, device, row) for row in listed), files={})
    for line in data.report(made["rejected"], made["warnings"]):
        print(line, file=sys.stderr)
    new = [row["features"] for row in made["rows"]]
    data.require(new, table, "names no readable ECG; the reasons stand above")
    x = standardise(np.concatenate([known, *new]), rows["train"])
    columns = {"id": [row["id"] for row in made["rows"]]}
    for target in cohort["phenotypes"] + cohort["outcomes"]:
        y = np.concatenate([cohort["columns"][target], np.full(len(new), np.nan)])
        found = fit(x, y, rows, target in cohort["outcomes"])
        if found is None:
            tell(f"{target}: too few training labels or only one value, not predicted")
            continue
        p = found["prediction"][len(known) :]
        if target in cohort["outcomes"]:
            columns[f"{target}_probability"] = p
            continue
        columns[target], error = p, np.abs(found["prediction"] - y)
        val, test = (e[~np.isnan(e)] for e in (error[rows["val"]], error[rows["test"]]))
        if len(val) < 20:
            tell(f"{target}: {len(val)} validation labels are too few for an interval (20 needed)")
            continue
        half = np.quantile(val, min(1, 0.95 * (1 + 1 / len(val))), method="higher")
        columns |= {f"{target}_low": p - half, f"{target}_high": p + half}
        covered = f"{(test <= half).mean():.1%} of {len(test)}" if len(test) else "none of 0"
        print(f"{label(target)}: 95 % interval +- {half:.3g} holds for {covered} test subjects")
    texts = ((v if isinstance(v, str) else f"{v:.5g}" for v in c) for c in columns.values())
    lines = [dict(zip(columns, line, strict=True)) for line in zip(*texts, strict=True)]
    data.write(out, lambda file: data.write_csv(file.name, columns, lines))
    print(f"wrote {out}: {len(new)} predicted, {len(made['rejected'])} rejected")
    print("Research use only, not for diagnosis.")


# ---------------------------------------------------------------- figures and tables


def label(name):
    """LVEF_pct -> LVEF (%)."""
    stem, _, unit = name.rpartition("_")
    return f"{stem} ({unit.replace('pct', '%')})" if stem else name


def bars(methods, title):
    """R^2 of every method for every phenotype, structural ones first, with bootstrap intervals."""
    grouped = groups(dict.fromkeys(name for table in methods.values() for name in table))
    names = grouped["structural"] + grouped["functional"]
    figure = Figure(figsize=(max(9, 1.1 * len(names)), 4.2), layout="constrained")
    axis, width = figure.subplots(), 0.84 / len(methods)
    for k, (method, table) in enumerate(methods.items()):
        shift = (k - (len(methods) - 1) / 2) * width
        place = [i + shift for i, name in enumerate(names) if name in table]
        shown = [[table[n]["r2"], *table[n]["r2_ci"]] for n in names if n in table]
        value, *ends = np.array(shown).reshape(-1, 3).T
        axis.bar(place, value, width, color=COLORS[k % len(COLORS)], label=method)
        axis.errorbar(place, value, np.abs(ends - value), fmt="none", ecolor="black", lw=0.8)
    axis.set_xticks(range(len(names)), [label(name).replace(" ", "\n") for name in names])
    axis.axvline(len(grouped["structural"]) - 0.5, color="gray", lw=1)
    axis.set(xlabel="structural | functional phenotypes", ylabel="R² on test, 95 % bootstrap")
    axis.set(title=title, ylim=np.clip(axis.get_ylim(), -0.5, 1.05))
    figure.legend(frameon=False, ncols=4, loc="outside lower center")
    return figure


def label_figure(curve, own, everyone, note):
    """R^2 of LVEF, or else of the first phenotype, against labelled subjects; everyone: "all"."""
    target = next((name for name in own if "LVEF" in name), next(iter(own)))
    sizes = {n: everyone if n == "all" else int(n) for n in curve}
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    for k, method in enumerate(dict.fromkeys(m for table in curve.values() for m in table)):
        found = {n: table.get(method, {}).get(target) for n, table in curve.items()}
        points = {sizes[n]: entry for n, entry in found.items() if entry}
        value, spread = ([p[key] for p in points.values()] for key in ("r2", "sd"))
        style = {"color": COLORS[k % len(COLORS)], "marker": "osD^vP*"[k % 7], "label": method}
        axis.errorbar([*points], value, spread, capsize=3, **style)
    axis.set_xscale("log")
    axis.set_xticks([], minor=True)
    axis.set_xticks([*sizes.values()], [*sizes.values()])
    axis.set(xlabel="labelled subjects, validation included", ylim=(-0.2, 1))
    axis.set_title(f"How many labels it takes{note}")
    axis.set_ylabel(f"R² of {label(target)} on test\n(mean and spread of draws)")
    axis.legend(frameon=False, ncols=2)
    return figure


def scatter(result, cohort, rows, title):
    """Predicted against true values of every phenotype in test subjects, with the identity line."""
    height = -(-len(result["probe"]) // 4)
    figure = Figure(figsize=(9, 2.5 * height + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(height, 4, squeeze=False).flat
    for name, axis in zip(result["probe"], axes, strict=False):  # so that zip skips no axis
        y, p = cohort["columns"][name][rows["test"]], result["predictions"][name][rows["test"]]
        axis.plot(y, p, ".", ms=3, color=COLORS[0])
        axis.axline((np.nanmean(y), np.nanmean(y)), slope=1, color="black", lw=1)
        low, high = np.nanmin(np.append(y, p)), np.nanmax(np.append(y, p))
        ends = low - 0.03 * (high - low), high + 0.03 * (high - low)
        axis.set(xlabel=f"true {label(name)}", ylabel=f"predicted {label(name)}")
        axis.set(xlim=ends, ylim=ends, aspect="equal")
        axis.set_title(f"R² {cell(result['probe'][name], 'r2')}", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    return figure


def gallery(cohort, embeddings, rows, title):
    """Four test ECGs, their own hearts and the hearts they retrieve, LVEF and LVEDV below."""
    phases, columns = [name for name in ("ed", "es") if name in embeddings], cohort["columns"]
    shown = [name for name in ("LVEF_pct", "LVEDV_ml") if name in cohort["phenotypes"]]
    order = rows[np.argsort(columns[shown[0]][rows])] if shown else rows
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(f"{title}\n(middle slice at {' | '.join(phases).upper()})")
    axes = figure.subplots(4, 5, width_ratios=(1.6, 1, 1, 1, 1))
    queries = order[np.linspace(0, len(order) - 1, 6).astype(int)[1:-1]]
    for line, query in zip(axes, queries, strict=True):
        scores = sum(embeddings["ecg"][query] @ embeddings[phase][rows].T for phase in phases)
        found = [query, *rows[np.argsort(-scores.numpy(), kind="stable")[:3]]]
        batch = data.read_batch(cohort, found)
        for k, lead in enumerate((0, 7, 10)):
            line[0].plot(np.arange(750) / 250, batch["ecg"][0, lead, :750] - 2.5 * k, "k", lw=0.6)
        line[0].set(xlabel="time (s), 2.5 mV between leads", yticks=[-5, -2.5, 0])
        line[0].set_yticklabels(["V5", "V2", "I"])
        for k, (axis, subject) in enumerate(zip(line[1:], found, strict=False)):
            hearts = [batch[phase][k, 0, batch[phase].shape[2] // 2] for phase in phases]
            greys = np.round(np.hstack(hearts) * 16)  # few grey levels: noise does not compress
            axis.imshow(greys, cmap="gray", interpolation="nearest")
            values = [f"{label(name)} {columns[name][subject]:.0f}" for name in shown]
            axis.set(xticks=[], yticks=[], xlabel="\n".join(values))
            own = f"retrieved {k}" + " (own)" * int(subject == query) if k else "own heart"
            axis.set_title(own, fontsize=9)
    return figure


def figures(metrics, results, first, cohort, rows, embeddings):
    """Every picture for which there is something to draw, after its name."""
    note, own = f" ({cohort['source']['kind']} cohort)", results[first]["probe"]
    if own:
        shown = {name: result["probe"] for name, result in results.items() if name != "mean"}
        yield "probe", bars(shown, f"What a linear probe reads from the ECG{note}")
        shown = {key.upper(): table for key, table in metrics["runs"][first]["latents"].items()}
        yield "latents", bars({"ECG": own} | shown, f"What the latents of {first} know{note}")
        yield "scatter", scatter(results[first], cohort, rows, f"{first} on test{note}")
    if own and metrics["labels"]:
        everyone = sum(len(labelled(cohort, rows[name])) for name in ("train", "val"))
        yield "labels", label_figure(metrics["labels"], own, everyone, note)
    if len(rows["test"]) > 1:
        title = f"Hearts nearest to an ECG{note}"
        yield "gallery", gallery(cohort, embeddings, rows["test"], title)


def cell(entry, key, form=".2f"):
    """'0.71 [0.65, 0.76]', the interval where there is one, and - where there is nothing."""
    ci = entry and (entry.get(f"{key}_ci") or entry.get("ci"))
    interval = f" [{ci[0]:{form}}, {ci[1]:{form}}]" if ci else ""
    return f"{entry[key]:{form}}{interval}" if entry else "-"


def markdown(title, columns, names, form=".2f"):
    """Lines of a table: columns {heading: ({name: metrics}, key)}, one row for each of names."""
    rows = [[title, *columns], ["---"] * (1 + len(columns))]
    for name in names:
        rows += [[name, *(cell(table.get(name), key, form) for table, key in columns.values())]]
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    return ["", *("| " + " | ".join(row) + " |" for row in rows)]


def table_text(metrics, cohort, rows, first):
    """table.md: probes, differences, latents, outcomes, few labels and retrieval."""
    runs, outcomes, grouped = metrics["runs"], cohort["outcomes"], groups(cohort["phenotypes"])

    def each(tables, key):
        return {heading: (table, key) for heading, table in tables.items()}

    def with_groups(tables):
        return {name: table | metrics["groups"][name] for name, table in tables.items()}

    probes = {name: run["probe"] for name, run in runs.items()} | metrics["baselines"]
    latents = {f"{first}.{key}": table for key, table in runs[first]["latents"].items()}
    names = [name for group in grouped for name in [*grouped[group], group] if grouped[group]]
    splits = ", ".join(f"{len(r)} {name}" for name, r in rows.items())
    kind, own = cohort["source"]["kind"].capitalize(), probes[first]
    lines = [f"{kind} cohort ({splits} subjects). R² on test, against the training mean, with 95 %"]
    lines += ["intervals; structural, functional: mean of the group; MAE in the phenotype's unit."]
    more = {f"r ({first})": (own, "pearson"), f"MAE ({first})": (own, "mae")}
    lines += markdown("R²", each(with_groups(probes), "r2") | more, names)
    for title, key, score, form, shown in (
        ("minus", "paired", "delta_r2", "+.2f", own),
        ("relative to", "relative", "relative", "+.1%", grouped),
    ):
        others = {pair.removeprefix(f"{first}-"): t for pair, t in metrics[key].items()}
        others.pop("mean")
        lines += markdown(f"R² of {first} {title}", each(others, score), shown, form)
    lines += markdown("R² from latents", each(with_groups({first: own} | latents), "r2"), names)
    if outcomes:
        tables = {n: run["outcomes"] for n, run in runs.items()} | metrics["baseline_outcomes"]
        lines += markdown("AUROC", each(tables, "auroc"), outcomes)
        more = {"prevalence": (tables[first], "prevalence")}
        lines += markdown("AUPRC", each(tables, "auprc") | more, outcomes)
    for n, tables in metrics["labels"].items():
        lines += markdown(f"R², {n} labels", each(tables, "r2"), cohort["phenotypes"])
    shown = "recall@1 chance@1 recall@5 chance@5 recall@10 chance@10 median_rank chance_rank n"
    for name, run in runs.items():
        columns = {key: (run["retrieval"], key) for key in shown.split()}
        lines += markdown(f"retrieval, {name}", columns, run["retrieval"], ".3g")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- command


def parse_arguments():
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders; the first is compared with the others")
    add("--data", metavar="PATH", help="cohort folder or manifest (default: that of the first RUN)")
    add("--labels", nargs="+", default=[], metavar="N", help="label curve, e.g. 50 100 500 all")
    add("--supervised", action="store_true", help="also train an ECG encoder on labels alone")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples of test (default 1000)")
    add("--seed", type=int, default=0, help="default 0")
    add("--predict", metavar="CSV", help="phenotypes of new ECGs (columns id, ecg), nothing else")
    args = parser.parse_args()
    for name, least, most in (("bootstrap", 1, 100_000), ("seed", 0, 2**63 - 1)):
        rule = f"must be from {least} to {most}"
        data.require(least <= getattr(args, name) <= most, f"--{name}", rule)
    return args


def make_baselines(args, cohort, rows, ecg, first, device):
    """What stands beside the runs: {name: features (N, D)}; ecg: features of the first run."""
    baselines = {"mean": np.zeros((len(cohort["ids"]), 1))}
    if cohort["covariates"]:
        x = np.stack([cohort["columns"][name] for name in cohort["covariates"]], 1)
        average = np.ma.masked_invalid(x[rows["train"]]).mean(0).filled(0)
        x = baselines["covariates"] = np.where(np.isnan(x), average, x)
        baselines[f"covariates+{first}"] = np.hstack([x, ecg])
    torch.manual_seed(args.seed)
    untrained = models.DualPhase(())
    baselines["random_encoder"] = extract(untrained, cohort, device)["features"]["ecg"]
    if args.supervised:
        tell("supervised on all labels")
        baselines["supervised"] = train_supervised(cohort, rows, device, args.seed)["outputs"]
    return baselines


def main():
    data.keep_memory()
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {run["name"]: run for run in map(load_run, args.runs)}
    taken = {"mean", "covariates", "random_encoder", "supervised"}
    unique = len({*runs} - taken) == len(args.runs)
    data.require(unique, "RUN", "two folders, or one and a baseline, share a name; rename one")
    cohort, first = choose_cohort(args.data, list(runs.values())), next(iter(runs))
    rows = {name: np.flatnonzero(cohort["split"] == name) for name in data.SPLITS}
    if args.predict:
        predict(runs[first], cohort, rows, args.predict, device)
        return 0
    most = len(labelled(cohort, rows["train"]))
    for count in args.labels:
        possible = count == "all" or count.isdecimal() and 20 <= int(count) <= most
        why = f"{count} is neither all nor a number from 20 to the {most} training subjects"
        data.require(possible, "--labels", f"{why} with a phenotype")
    targets = cohort["phenotypes"] + cohort["outcomes"]
    if args.supervised and not (targets and len(rows["train"]) >= 8 and len(rows["val"])):
        tell("supervised needs targets, 8 training and some validation subjects: left out")
        args.supervised = False

    metrics, counts = defaultdict(dict), resamples(len(rows["test"]), args.bootstrap, args.seed)
    results, encoders, arrays, embeddings = {}, {}, {}, {}

    def probed(x, outcomes=True):
        return probe(standardise(x, rows["train"]), cohort, rows, counts, outcomes)

    for name, run in runs.items():
        tell(f"features of {name}")
        found = extract(run["model"], cohort, device)
        features, embeddings[name] = found["features"], found["embeddings"]
        arrays |= {key if name == first else f"{name}.{key}": x for key, x in features.items()}
        encoders[name] = features.pop("ecg")
        results[name] = probed(encoders[name])
        if len(features) == 2:
            features["ed+es"] = np.hstack([*features.values()])
        latents = {key: probed(x, outcomes=False) for key, x in features.items()}
        metrics["groups"] |= {f"{name}.{key}": latent["groups"] for key, latent in latents.items()}
        about = metrics["runs"][name] = {key: results[name][key] for key in ("probe", "outcomes")}
        about["retrieval"] = retrieval(embeddings[name], rows["test"])
        about["latents"] = {key: latent["probe"] for key, latent in latents.items()}
    for target in (name for name in targets if name not in results[first]["samples"]):
        tell(f"{target}: left out, as train or test knows too few labels or only one value")

    baselines = make_baselines(args, cohort, rows, encoders[first], first, device)
    for name, x in baselines.items():
        results[name], arrays[name] = probed(x), x
        metrics["baselines"][name] = results[name]["probe"]
        metrics["baseline_outcomes"][name] = results[name]["outcomes"]
    for name, result in results.items():
        metrics["groups"][name] = result["groups"]
        if name != first:
            for key, table in compare(results[first], result).items():
                metrics[key][f"{first}-{name}"] = table
    encoders |= {k: x for k, x in baselines.items() if k in ("random_encoder", "supervised")}
    metrics["labels"] = label_curve(encoders, cohort, rows, args.labels, device, args.seed)

    out = runs[first]["folder"] / "eval"
    out.mkdir(exist_ok=True)
    text = table_text(metrics, cohort, rows, first)
    data.write(out / "metrics.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    data.write(out / "table.md", lambda file: file.write(text.encode()))
    arrays |= {"id": cohort["ids"], "split": cohort["split"]}
    data.write(out / "features.npz", lambda file: np.savez(file, **arrays))
    for name in FIGURES:  # those of an earlier evaluation may not stay
        (out / f"{name}.png").unlink(missing_ok=True)
    for name, figure in figures(metrics, results, first, cohort, rows, embeddings[first]):
        data.write(out / f"{name}.png", partial(figure.savefig, dpi=100, format="png"))
    print(f"{text}\nwrote {out}")
    return 0


if __name__ == "__main__":
    data.exit_cleanly(main)
