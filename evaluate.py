"""Freeze a trained ECG encoder and ask what it knows of the heart.

    python evaluate.py runs/dual                                  # probe, retrieval; writes runs/dual/eval/
    python evaluate.py runs/dual runs/ed runs/es --supervised --labels 50 100 250 500 1000 all
    python evaluate.py runs/dual --predict new.csv                # phenotypes of new ECGs (columns id, ecg)

Probes are linear: ridge for phenotypes, L2 logistic regression for outcomes, on the features before
the head, standardised on training subjects. Their strength alpha is chosen on validation subjects;
test subjects are used once, with a bootstrap over them for intervals.
"""
import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import special, stats

import data
import loss
import models

ALPHAS = 10.0 ** np.arange(-1, 5.5, 0.5)
DIRECTIONS = ("ecg_to_ed", "ecg_to_es", "ed_to_ecg", "es_to_ecg", "ed_to_es")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")  # Okabe & Ito
NOT_DIAGNOSTIC = "research use only, not for diagnosis"


# ---------------------------------------------------------------- frozen features

def load_run(folder):
    """dict(name, folder, model, args, cohort (fingerprint)) of a run folder, from best.pt."""
    path = Path(folder) / "best.pt"
    if not path.is_file():
        raise data.InputError(folder, "holds no trained run (no best.pt); train one with train.py")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = models.DualPhase(saved["args"]["phases"])
        model.load_state_dict(saved["model"])
    except Exception as error:
        reason = str(error).splitlines()[0][:100]
        raise data.InputError(path, f"is damaged or of another architecture ({reason}); train again") from None
    return {"name": Path(folder).resolve().name, "folder": Path(folder), "model": model.eval(),
            "args": saved["args"], "cohort": saved["cohort"]}


@torch.no_grad()
def extract(model, cohort, device, names=("ecg", "ed", "es")):
    """Features {name: (N, D)} and embeddings {name: (N, 128)} of every subject by a frozen model.

    Frozen means frozen: a parameter or buffer that changes meanwhile is an error.
    """
    model = model.to(device).eval()
    before = copy.deepcopy(model.state_dict())
    names = [name for name in names if name in model.encoders]
    parts = []
    load = partial(data.read_batch, cohort, device=device, names=names)
    for batch in data.read_ahead(load, np.array_split(np.arange(len(cohort["ids"])), -(-len(cohort["ids"]) // 128))):
        features = model(batch)
        parts.append((features, model.embed(features)))
    if any(not torch.equal(before[key], value) for key, value in model.state_dict().items()):
        raise RuntimeError("the frozen encoder changed while features were extracted")
    features, embeddings = ({name: torch.cat([part[k][name] for part in parts]).cpu() for name in names}
                            for k in (0, 1))
    return {"features": {name: x.numpy().astype(np.float64) for name, x in features.items()},
            "embeddings": embeddings}


# ---------------------------------------------------------------- probes

def standardise(x, rows):
    return (x - x[rows].mean(0)) / (x[rows].std(0) + 1e-9)


def fit_ridge(x, y, train, val):
    """Ridge in closed form: w = (X'X + alpha I)^-1 X'y, alpha with the least validation error.

    x (N, D) features, y (N,) with nan where unknown; only rows train and val are looked at. Returns
    dict(prediction (N,), alpha, mean (of y on train)), or None with fewer than 3 training labels.
    """
    train, val = train[~np.isnan(y[train])], val[~np.isnan(y[val])]
    if len(train) < 3:
        return None
    x, mean = standardise(x, train), y[train].mean()
    values, vectors = np.linalg.eigh(x[train].T @ x[train])
    target = vectors.T @ (x[train].T @ (y[train] - mean))
    weights = vectors @ (target[:, None] / (values.clip(0)[:, None] + ALPHAS))  # (D, alphas)
    predictions = x @ weights + mean  # (N, alphas)
    errors = np.square(predictions[val] - y[val, None]).mean(0) if len(val) else np.abs(np.log10(ALPHAS) - 2)
    best = int(errors.argmin())
    return {"prediction": predictions[:, best], "alpha": ALPHAS[best], "mean": mean}


def fit_logistic(x, y, train, val):
    """L2 logistic regression by Newton's method, alpha with the least validation log loss.

    As fit_ridge; prediction is the probability. None without both classes among training labels.
    """
    train, val = train[~np.isnan(y[train])], val[~np.isnan(y[val])]
    if len(set(y[train])) < 2:
        return None
    x = np.column_stack([standardise(x, train), np.ones(len(x))])
    best, weights = None, np.zeros(x.shape[1])
    for alpha in ALPHAS[::-2]:  # from strong to weak, each starting where the last one ended
        penalty = np.append(np.full(x.shape[1] - 1, alpha), 1e-6)  # the intercept goes free
        for _ in range(20):
            p = special.expit(x[train] @ weights)
            slope = x[train].T @ (p - y[train]) + penalty * weights
            curve = (x[train].T * (p * (1 - p) + 1e-9)) @ x[train] + np.diag(penalty)
            step = np.linalg.solve(curve, slope)
            weights = weights - step / max(1, np.abs(step).max())
            if np.abs(step).max() < 1e-5:
                break
        z = x @ weights
        error = np.logaddexp(0, -z[val] * (2 * y[val] - 1)).mean() if len(val) else abs(np.log10(alpha) - 2)
        if best is None or error < best["error"]:
            best = {"prediction": special.expit(z), "alpha": alpha, "error": error}
    return best


def resamples(n, count, seed):
    """How often each of n test subjects is drawn in each bootstrap sample: (count, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=count).astype(float)


def r2(y, prediction, mean, counts):
    """R^2 against the training mean, (len(counts),): 1 - sum (y - p)^2 / sum (y - mean)^2."""
    return 1 - counts @ np.square(y - prediction) / np.maximum(counts @ np.square(y - mean), 1e-12)


def auroc(y, score, counts):
    """Area under the ROC curve with ties counted half, (len(counts),); nan without both classes."""
    levels, place = np.unique(score, return_inverse=True)
    positive, negative = (np.stack([np.bincount(place, row * (y == k), len(levels)) for row in counts])
                          for k in (1, 0))
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def average_precision(y, score):
    """Area under the precision-recall curve as the mean precision at each positive."""
    order = np.argsort(-score, kind="stable")
    hits = y[order].cumsum()
    last = np.append(np.diff(score[order]) != 0, True)  # ties count together
    recall = np.diff(np.append(0, hits[last])) / hits[-1]
    return float((recall * hits[last] / (np.flatnonzero(last) + 1)).sum())


def interval(values):
    return [float(v) for v in np.nanpercentile(values, [2.5, 97.5])] if np.isfinite(values).any() else None


def probe(x, cohort, rows, bootstrap, seed, outcomes=True):
    """Probe every target from features x: dict(phenotypes, outcomes) of metrics, and the samples.

    rows: dict(train, val, test). samples[target] (bootstrap,) are for paired differences.
    """
    result = {"phenotypes": {}, "outcomes": {}, "samples": {}, "predictions": {}}
    for target in cohort["phenotypes"] + cohort["outcomes"] * outcomes:
        y, is_outcome = cohort["columns"][target], target in cohort["outcomes"]
        fit = (fit_logistic if is_outcome else fit_ridge)(x, y, rows["train"], rows["val"])
        test = rows["test"][~np.isnan(y[rows["test"]])]
        if fit is None or len(test) < 3 or np.ptp(y[test]) == 0:
            continue
        p, counts = fit["prediction"][test], resamples(len(test), bootstrap, seed)
        one = np.ones((1, len(test)))
        if is_outcome:
            samples = auroc(y[test], p, counts)
            result["outcomes"][target] = {
                "auroc": float(auroc(y[test], p, one)[0]), "auroc_ci": interval(samples),
                "auprc": average_precision(y[test], p), "prevalence": float(y[test].mean()),
                "n_test": len(test), "alpha": float(fit["alpha"])}
        else:
            samples = r2(y[test], p, fit["mean"], counts)
            result["phenotypes"][target] = {
                "r2": float(r2(y[test], p, fit["mean"], one)[0]), "r2_ci": interval(samples),
                "pearson": float(np.corrcoef(y[test], p)[0, 1]) if np.ptp(p) > 0 else 0.0,
                "mae": float(np.abs(y[test] - p).mean()), "n_test": len(test), "alpha": float(fit["alpha"])}
        result["samples"][target], result["predictions"][target] = samples, fit["prediction"]
    return result


def paired(a, b):
    """Difference of two probes on the same bootstrap samples, per target."""
    table = {}
    for kind, score in (("phenotypes", "r2"), ("outcomes", "auroc")):
        for target in a[kind].keys() & b[kind].keys():
            table[target] = {f"delta_{score}": a[kind][target][score] - b[kind][target][score],
                             "ci": interval(a["samples"][target] - b["samples"][target])}
    return table


def retrieval(embeddings, rows, bootstrap, seed):
    """recall@k, median rank and intervals over the whole test split, for every pair of encoders."""
    result, n = {}, len(rows)
    for direction in DIRECTIONS:
        query, gallery = direction.split("_to_")
        if query in embeddings and gallery in embeddings and n > 1:
            ranks = loss.retrieval_ranks(embeddings[query][rows], embeddings[gallery][rows]).numpy()
            counts = resamples(n, bootstrap, seed)
            result[direction] = {"median_rank": float(np.median(ranks)), "n": n}
            for k in (1, 5, 10):
                result[direction] |= {f"recall@{k}": float((ranks <= k).mean()),
                                      f"recall@{k}_ci": interval(counts @ (ranks <= k) / n),
                                      f"chance@{k}": min(k / n, 1.0)}
    return result


# ---------------------------------------------------------------- supervised opponent, few labels

def train_supervised(cohort, train, val, device, seed, rates=(1e-3, 3e-3)):
    """The same ECG encoder trained from scratch on the labels: a fair opponent of the frozen one.

    One linear output per target on standardised values (cross-entropy for outcomes), all targets at
    once, the augmentation of train.py; learning rate and epoch by validation loss. Its features are
    then probed like any other encoder's. Returns dict(model, rate, error).
    """
    targets = cohort["phenotypes"] + cohort["outcomes"]
    y = np.stack([cohort["columns"][name] for name in targets], 1)
    binary = torch.tensor([name in cohort["outcomes"] for name in targets])
    mean, std = np.nanmean(y[train], 0), np.nanstd(y[train], 0) + 1e-9
    y = torch.from_numpy(np.where(binary, y, (y - mean) / std).astype(np.float32))

    def error(model, output, batch, rows):
        got, wanted = output(model(batch)["ecg"]).cpu(), y[rows]
        square = (got - wanted.nan_to_num()).square()
        entropy = F.binary_cross_entropy_with_logits(got, wanted.nan_to_num(), reduction="none")
        return torch.where(binary, entropy, square)[~wanted.isnan()].mean()

    best = {"error": np.inf}
    size, epochs = max(2, min(64, len(train) // 4)), int(np.clip(12_000 // len(train) + 10, 10, 60))
    heard = data.read_batch(cohort, val, device, names=("ecg",))
    for rate in rates:
        torch.manual_seed(seed)
        model, output = models.DualPhase(()).to(device), torch.nn.Linear(models.FEATURES, len(targets)).to(device)
        optimizer = torch.optim.AdamW([*model.encoders.parameters(), *output.parameters()], weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * max(1, len(train) // size))
        for epoch in range(epochs):

            def load(rows, epoch=epoch):
                batch = data.read_batch(cohort, rows, device, names=("ecg",))
                return rows, data.augment(batch, rows, seed, epoch)

            model.train()
            for rows, batch in data.read_ahead(load, data.epoch_batches(train, size, seed, epoch)):
                optimizer.zero_grad()
                error(model, output, batch, rows).backward()
                optimizer.step()
                schedule.step()
            model.eval()
            with torch.no_grad():
                score = float(error(model, output, heard, val))
            if score < best["error"]:
                best = {"error": score, "rate": rate, "model": copy.deepcopy(model)}
    return best


def label_curve(encoders, cohort, rows, counts, supervised, device, seed):
    """R^2 on test against the number of labels: {n: {method: {phenotype: dict(r2, sd)}}}.

    A budget of n labels pays for validation too: a fifth of it chooses alpha (or rate and epoch), the
    rest is fitted. Frozen features get 10 draws of n subjects, supervised training 3; 'all' is one
    draw, the whole training and validation splits. supervised: also train from scratch.
    """
    curve = {}
    for count in counts:
        scores, rates = {}, (1e-3, 3e-3)
        draws = 1 if count == "all" else 10
        for draw in range(draws):
            chosen = rows
            if count != "all":
                picked = np.random.default_rng([seed, int(count), draw]).choice(
                    rows["train"], int(count), replace=False)
                chosen = {**rows, "train": picked[int(count) // 5:], "val": picked[:int(count) // 5]}
            features = dict(encoders)
            if supervised and count != "all" and draw < 3:
                tell(f"supervised on {count} labels, draw {draw + 1} of 3")
                best = train_supervised(cohort, chosen["train"], chosen["val"], device, seed + draw, rates)
                rates = (best["rate"],)  # chosen on the first draw
                features["supervised"] = extract(best["model"], cohort, device)["features"]["ecg"]
            for method, x in features.items():
                if method == "supervised" and count != "all" and draw >= 3:
                    continue
                for target, metrics in probe(x, cohort, chosen, 1, seed, False)["phenotypes"].items():
                    scores.setdefault(method, {}).setdefault(target, []).append(metrics["r2"])
        curve[str(count)] = {method: {target: {"r2": float(np.mean(v)), "sd": float(np.std(v))}
                                      for target, v in table.items()} for method, table in scores.items()}
    return curve


# ---------------------------------------------------------------- prediction

def predict(run, cohort, table, device):
    """Phenotypes and outcomes of new ECGs: the frozen encoder, and probes fitted on the run's cohort.

    Writes predictions.csv beside the table of ids and ECGs. The 95 % interval of a phenotype is the
    prediction plus or minus the 95 % quantile of absolute validation residuals (split conformal).
    """
    rows = split_rows(cohort)
    known = extract(run["model"], cohort, device, ("ecg",))["features"]["ecg"]
    mains_hz = cohort["source"].get("mains_hz", 50)
    new, rejected = [], []
    for row in data.read_table(table, ("id", "ecg")):
        try:
            if "wrong" in row:
                raise data.InputError(table, row["wrong"])
            path = Path(table).parent / row["ecg"]
            ecg = data.read_clean_ecg(path, mains_hz)["ecg"]
            with torch.no_grad():
                mv = torch.from_numpy(ecg[None] / np.float32(1000)).to(device)
                new.append((row["id"], run["model"]({"ecg": mv})["ecg"].cpu().numpy()[0]))
        except data.InputError as error:
            rejected.append({"id": row.get("id", ""), "file": error.where, "reason": error.why})
    for bad in rejected:
        print(f"rejected {bad['id']}: {bad['file']}: {bad['reason']}", file=sys.stderr)
    if not new:
        raise data.InputError(table, "names no readable ECG; see the reasons above")
    x = np.concatenate([known, np.stack([feature for _, feature in new])])
    columns = {"id": [name for name, _ in new]}
    for target in cohort["phenotypes"] + cohort["outcomes"]:
        y = np.concatenate([cohort["columns"][target], np.full(len(new), np.nan)])
        is_outcome = target in cohort["outcomes"]
        fit = (fit_logistic if is_outcome else fit_ridge)(x, y, rows["train"], rows["val"])
        if fit is None:
            continue
        columns[f"{target}_probability" if is_outcome else target] = fit["prediction"][len(known):]
        if not is_outcome and len(rows["val"]) >= 20:
            error = np.abs(fit["prediction"] - y)
            val, test = (error[rows[name]][~np.isnan(error[rows[name]])] for name in ("val", "test"))
            half = np.quantile(val, min(1, 0.95 * (1 + 1 / len(val))))
            columns[f"{target}_low"] = columns[target] - half
            columns[f"{target}_high"] = columns[target] + half
            print(f"{target}: prediction +- {half:.3g}; the interval covers {(test <= half).mean():.1%} "
                  f"of {len(test)} test subjects")
    out = Path(table).with_name("predictions.csv")
    lines = [dict(zip(columns, (v if isinstance(v, str) else f"{v:.5g}" for v in values), strict=True))
             for values in zip(*columns.values(), strict=True)]
    data.write_csv(out.with_suffix(".partial"), list(columns), lines)
    out.with_suffix(".partial").replace(out)
    print(f"wrote {out}: {len(new)} predicted, {len(rejected)} rejected; {NOT_DIAGNOSTIC}")


# ---------------------------------------------------------------- figures and tables

def is_functional(name):
    """Whether a phenotype describes contraction rather than size, by its name."""
    return any(part in name.upper() for part in ("SV", "EF", "STRAIN"))


def bars(path, methods, phenotypes, note):
    """R^2 of every method for every phenotype, with bootstrap intervals."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(methods)
    for k, (name, table) in enumerate(methods.items()):
        shown = [(i, table[target]) for i, target in enumerate(phenotypes) if target in table]
        place = [i + (k - (len(methods) - 1) / 2) * width for i, _ in shown]
        value = np.array([m["r2"] for _, m in shown])
        reach = np.abs(np.array([m["r2_ci"] or [m["r2"]] * 2 for _, m in shown]).T - value)
        axis.bar(place, value, width * 0.9, color=COLORS[k % len(COLORS)], label=name)
        axis.errorbar(place, value, reach, fmt="none", ecolor="black", lw=0.8)
    axis.set_xticks(range(len(phenotypes)), [f"{p}\n{'functional' if is_functional(p) else 'structural'}"
                                             for p in phenotypes])
    axis.set(ylabel="R² on test (95 % bootstrap)", title=f"What a linear probe reads{note}")
    axis.legend(frameon=False, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save_figure(figure, path)


def label_figure(path, curve, labels, target, note):
    """R^2 of one phenotype against the number of labels; labels: {budget: number of subjects}."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for k, name in enumerate(dict.fromkeys(name for table in curve.values() for name in table)):
        points = [(labels[n], table[name][target]) for n, table in curve.items()
                  if target in table.get(name, {})]
        axis.errorbar([n for n, _ in points], [m["r2"] for _, m in points], [m["sd"] for _, m in points],
                      color=COLORS[k % len(COLORS)], marker="o", capsize=3, label=name)
    axis.set_xscale("log")
    axis.set_xticks(sorted(set(labels.values())), sorted(set(labels.values())), minor=False)
    axis.set_xticks([], minor=True)
    axis.set(xlabel="labelled subjects", ylabel="R² on test (mean ± spread of draws)", ylim=(-0.2, 1),
             title=f"{target} from few labels{note}")
    axis.legend(frameon=False)
    save_figure(figure, path)


def scatter(path, result, cohort, rows, note):
    """Predicted against true values of every phenotype with the identity line."""
    names = list(result["phenotypes"])
    figure = Figure(figsize=(12, 3 * -(-len(names) // 4)), layout="constrained")
    figure.suptitle(f"Predicted from the ECG alone{note}")
    for axis, name in zip(figure.subplots(-(-len(names) // 4), 4, squeeze=False).flat, names, strict=False):
        y, p = cohort["columns"][name][rows["test"]], result["predictions"][name][rows["test"]]
        axis.plot(y, p, ".", ms=3, color=COLORS[0])
        ends = [np.nanmin(y), np.nanmax(y)]
        axis.plot(ends, ends, color="black", lw=1)
        axis.set(xlabel=f"true {name}", ylabel="predicted", title=f"R² {result['phenotypes'][name]['r2']:.2f}")
    save_figure(figure, path)


def latent_figure(path, latents, phenotypes, note):
    """What the latents know of structure and of function: R^2 as a table of coloured cells."""
    names = sorted(phenotypes, key=is_functional)
    values = np.array([[table.get(name, {"r2": np.nan})["r2"] for name in names] for table in latents.values()])
    figure = Figure(figsize=(10, 1 + 0.6 * len(latents)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(latents)), latents)
    axis.axvline(sum(not is_functional(name) for name in names) - 0.5, color="white", lw=3)
    axis.set_title(f"R² from each latent: structural | functional phenotypes{note}")
    save_figure(figure, path)


def gallery(path, cohort, embeddings, rows, device, note):
    """Four test ECGs over the range of the first phenotypes, their own hearts, and those they retrieve."""
    phases = [phase for phase in ("ed", "es") if phase in embeddings]
    shown = [name for name in ("LVEF_pct", "LVEDV_ml") if name in cohort["phenotypes"]] or cohort["phenotypes"][:2]
    order = rows[np.argsort(cohort["columns"][shown[0]][rows])] if shown else rows
    queries = order[np.linspace(0, len(order) - 1, 6).astype(int)[1:-1]]
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(f"ECG, its own heart ({' | '.join(phases).upper()}), the hearts it retrieves{note}")
    axes = figure.subplots(4, 6, width_ratios=(2, 1.3, 1.3, 1.3, 1.3, 1.3))
    seconds = np.arange(1000) / data.SAMPLING_RATE_HZ
    for line, query in zip(axes, queries, strict=True):
        score = sum(embeddings["ecg"][query] @ embeddings[phase][rows].T for phase in phases)
        hits = rows[np.argsort(-score.numpy(), kind="stable")[:4]]
        ecg = data.read_batch(cohort, [query], device, names=("ecg",))["ecg"][0].cpu()
        for k, lead in enumerate((1, 7, 10)):
            line[0].plot(seconds, ecg[lead, :1000] - 2.5 * k, "k", lw=0.6)
            line[0].text(0, 0.5 - 2.5 * k, data.LEADS[lead])
        line[0].set(xlabel="time (s)", yticks=[])
        for axis, subject in zip(line[1:], [query, *hits], strict=True):
            batch = data.read_batch(cohort, [subject], names=phases)
            middle = batch[phases[0]].shape[2] // 2
            axis.imshow(np.hstack([batch[phase][0, 0, middle] for phase in phases]), cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel("\n".join(f"{name} {cohort['columns'][name][subject]:.0f}" for name in shown))
            axis.set_title("own heart" if axis is line[1] else "retrieved" + (" (own)" if subject == query else ""),
                           fontsize=9)
    save_figure(figure, path)


def table_text(metrics, cohort, first):
    """table.md: R^2 per phenotype and method, the relative change per group, outcomes, retrieval."""
    methods = {name: run["probe"] for name, run in metrics["runs"].items()} | metrics["baselines"]
    lines = [f"Cohort: {cohort['source']['kind']}. R² on test with 95 % bootstrap interval.", "",
             "| phenotype | " + " | ".join(methods) + f" | r, MAE ({first}) |", "|---" * (len(methods) + 2) + "|"]
    for functional in (False, True):
        group = [name for name in cohort["phenotypes"] if is_functional(name) == functional]
        for name in group:
            cells = [f"{m[name]['r2']:.2f} [{m[name]['r2_ci'][0]:.2f}, {m[name]['r2_ci'][1]:.2f}]"
                     if name in m and m[name]["r2_ci"] else "-" for m in methods.values()]
            own = methods[first].get(name)
            cells.append(f"{own['pearson']:.2f}, {own['mae']:.3g} {unit(name)}" if own else "-")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        means = {method: np.mean([table[name]["r2"] for name in group]) for method, table in methods.items()
                 if group and all(name in table for name in group)}
        if means:
            lines.append(f"| **{'functional' if functional else 'structural'} mean** | " + " | ".join(
                f"**{means[m]:.3f}**" if m in means else "-" for m in methods) + " | |")
            lines += [f"| {first} against {m} | {(means[first] / means[m] - 1):+.1%} |" + " |" * len(methods)
                      for m in metrics["runs"] if m in means and m != first and first in means]
    if cohort["outcomes"]:
        outcome = {name: run["outcomes"] for name, run in metrics["runs"].items()} | metrics["baseline_outcomes"]
        lines += ["", "AUROC with 95 % bootstrap interval, AUPRC (prevalence).", "",
                  "| outcome | " + " | ".join(outcome) + " |", "|---" * (len(outcome) + 1) + "|"]
        for name in cohort["outcomes"]:
            cells = [f"{m[name]['auroc']:.2f} [{m[name]['auroc_ci'][0]:.2f}, {m[name]['auroc_ci'][1]:.2f}], "
                     f"{m[name]['auprc']:.2f} ({m[name]['prevalence']:.2f})" if name in m else "-"
                     for m in outcome.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| retrieval over the test split | recall@1 | @5 | @10 | median rank | chance @1 |", "|---" * 6 + "|"]
    for name, run in metrics["runs"].items():
        lines += [f"| {name} {direction} | {r['recall@1']:.3f} [{r['recall@1_ci'][0]:.3f}, {r['recall@1_ci'][1]:.3f}] | "
                  f"{r['recall@5']:.3f} | {r['recall@10']:.3f} | {r['median_rank']:.0f} of {r['n']} | {1 / r['n']:.4f} |"
                  for direction, r in run["retrieval"].items()]
    return "\n".join(lines) + "\n"


def unit(name):
    return name.rsplit("_", 1)[1].replace("pct", "%") if "_" in name else ""


def save_figure(figure, path):
    figure.savefig(path.with_suffix(".partial"), dpi=100, format="png")
    path.with_suffix(".partial").replace(path)


# ---------------------------------------------------------------- command

def split_rows(cohort):
    return {name: np.flatnonzero(cohort["split"] == name) for name in ("train", "val", "test")}


def tell(text):
    print(f"... {text}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders; the first is the reference of comparisons")
    add("--data", metavar="PATH", help="cohort folder or manifest (default: what the first run was trained on)")
    add("--labels", nargs="+", default=[], metavar="N", help="label-efficiency curve, e.g. 50 100 500 all")
    add("--supervised", action="store_true", help="also train the ECG encoder from scratch on the labels")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the test split (default 1000)")
    add("--seed", type=int, default=0, help="default 0")
    add("--predict", metavar="CSV", help="phenotypes of new ECGs (columns id, ecg): writes predictions.csv")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.bootstrap < 1 or args.seed < 0:
        raise data.InputError("--bootstrap, --seed", "must be at least 1 and 0")
    runs = {run["name"]: run for run in map(load_run, args.runs)}
    if len(runs) < len(args.runs):
        raise data.InputError("RUN", "two run folders have the same name; rename one")
    first = next(iter(runs))
    cohort = data.find_cohort(args.data or runs[first]["args"]["data"])
    rows = split_rows(cohort)
    if args.predict:
        predict(runs[first], cohort, args.predict, device)
        return 0
    for count in args.labels:
        if count != "all" and not (count.isdigit() and 20 <= int(count) <= len(rows["train"])):
            raise data.InputError("--labels", f"{count} is neither 'all' nor a number from 20 to the "
                                              f"{len(rows['train'])} training subjects")
    for name, least, lost in (("train", 3, "probes"), ("val", 2, "the choice of alpha (fixed at 100)"),
                              ("test", 3, "R², AUROC and their intervals")):
        if len(rows[name]) < least:
            tell(f"{cohort['folder']} has {len(rows[name])} {name} subjects, too few for {lost}: left out")

    test = partial(probe, cohort=cohort, rows=rows, bootstrap=args.bootstrap, seed=args.seed)
    results, encoders, arrays, metrics = {}, {}, {}, {"runs": {}, "baselines": {}, "baseline_outcomes": {}}
    for name, run in runs.items():
        tell(f"features of {name}")
        extracted = extract(run["model"], cohort, device)
        features, encoders[name] = extracted["features"], extracted["features"]["ecg"]
        results[name] = test(encoders[name])
        latents = {key: features[key] for key in ("ed", "es") if key in features}
        if len(latents) == 2:
            latents["ed+es"] = np.hstack([features["ed"], features["es"]])
        metrics["runs"][name] = {
            "probe": results[name]["phenotypes"], "outcomes": results[name]["outcomes"],
            "retrieval": retrieval(extracted["embeddings"], rows["test"], args.bootstrap, args.seed),
            "latents": {key: test(x, outcomes=False)["phenotypes"] for key, x in latents.items()}}
        arrays |= {key if name == first else f"{name}.{key}": x for key, x in features.items()}
        if name == first:
            embeddings = extracted["embeddings"]

    torch.manual_seed(args.seed)
    baselines = {"mean": np.zeros((len(cohort["ids"]), 1))}
    covariates = np.stack([cohort["columns"][name] for name in cohort["covariates"]], 1) if cohort["covariates"] else None
    if covariates is not None:
        covariates = np.where(np.isnan(covariates), np.nanmean(covariates[rows["train"]], 0), covariates)
        baselines["covariates"] = covariates
        baselines[f"covariates+{first}"] = np.hstack([covariates, encoders[first]])
    encoders["random_encoder"] = extract(models.DualPhase(()), cohort, device)["features"]["ecg"]
    baselines["random_encoder"] = encoders["random_encoder"]
    if args.supervised:
        tell("supervised on all labels")
        best = train_supervised(cohort, rows["train"], rows["val"], device, args.seed)
        encoders["supervised"] = extract(best["model"], cohort, device)["features"]["ecg"]
        baselines["supervised"] = encoders["supervised"]
    for name, x in baselines.items():
        results[name] = test(x)
        metrics["baselines"][name] = results[name]["phenotypes"]
        metrics["baseline_outcomes"][name] = results[name]["outcomes"]
        arrays[f"{name}.ecg"] = x
    metrics["paired"] = {f"{first}-{name}": paired(results[first], other) for name, other in results.items()
                         if name != first}
    metrics["labels"] = label_curve(encoders, cohort, rows, args.labels, args.supervised, device, args.seed)

    out = runs[first]["folder"] / "eval"
    out.mkdir(exist_ok=True)
    text = table_text(metrics, cohort, first)
    (out / "metrics.json.partial").write_text(json.dumps(metrics, indent=1))
    (out / "metrics.json.partial").replace(out / "metrics.json")
    (out / "table.md").write_text(text)
    with open(out / "features.partial", "wb") as file:
        np.savez(file, id=np.array(cohort["ids"]), split=cohort["split"], **arrays)
    (out / "features.partial").replace(out / "features.npz")
    note = f" ({cohort['source']['kind']} cohort)"
    if results[first]["phenotypes"]:
        shown = {name: results[name]["phenotypes"] for name in results if name != "mean"}
        bars(out / "probe.png", shown, cohort["phenotypes"], note)
        scatter(out / "scatter.png", results[first], cohort, rows, note)
        latents = metrics["runs"][first]["latents"] | {"ecg": results[first]["phenotypes"]}
        latent_figure(out / "latents.png", latents, cohort["phenotypes"], note)
    if len(rows["test"]) >= 6:
        gallery(out / "gallery.png", cohort, embeddings, rows["test"], device, note)
    if metrics["labels"]:
        labels = {n: len(rows["train"]) + len(rows["val"]) if n == "all" else int(n) for n in metrics["labels"]}
        target = "LVEF_pct" if "LVEF_pct" in cohort["phenotypes"] else cohort["phenotypes"][0]
        label_figure(out / "labels.png", metrics["labels"], labels, target, note)
    print(text)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    data.exit_cleanly(main)
