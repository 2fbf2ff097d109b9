"""Probes and scores against written-out formulas, honesty of the protocol, and the command."""

import argparse
import csv
import dataclasses
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats

import data
import evaluate
import models
import synthetic

RNG = np.random.default_rng(0)


def make_run(folder, cohort, views=("ed", "es"), slices=12):
    """A run folder with an untrained model, as train.py would leave it."""
    torch.manual_seed(0)
    args = {"views": list(views), "slices": slices, "data": str(cohort.folder)}
    model = models.build(argparse.Namespace(**args))
    state = {"model": model.state_dict(), "args": args, "cohort": cohort.fingerprint, "log": []}
    folder.mkdir(parents=True)
    torch.save(state, folder / "best.pt")
    return folder


def splits(cohort):
    return {split: cohort.indices(split) for split in data.SPLITS}


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return data.open_cohort(cohort_folder)


@pytest.fixture
def problem():
    """Features (300, 8) that know a little of two phenotypes and an outcome, and their cohort."""
    x = np.random.default_rng(1).normal(size=(300, 8))
    y = x[:, 0] + np.random.default_rng(2).normal(size=300)
    columns = {"LVM_g": y * 20 + x[:, 1] * 20, "LVEF_pct": y * 5 + 60, "sick": 1.0 * (y > 0.5)}
    split = np.array(["train", "train", "train", "val", "test"] * 60)
    targets = {"phenotypes": ["LVM_g", "LVEF_pct"], "outcomes": ["sick"], "covariates": []}
    rest = {"folder": Path("none"), "ids": split, "source": {}, "fingerprint": ""}
    return x, data.Cohort(split=split, columns=columns, **targets, **rest)


def probe(x, cohort, targets=("LVM_g", "LVEF_pct", "sick")):
    counts = evaluate.bootstrap_counts(len(cohort.indices("test")), 50, 0)
    return evaluate.probe(x, cohort, splits(cohort), targets, counts)


# ---------------------------------------------------------------- formulas


def test_ridge_is_least_squares_with_penalty_rows():
    x = RNG.normal(size=(40, 6)) + 1
    y = RNG.normal(size=40) + 3
    weights = evaluate.ridge(x, y, np.array([0.1, 10.0]))
    for k, alpha in enumerate((0.1, 10.0)):
        penalty = np.hstack([np.sqrt(alpha) * np.eye(6), np.zeros((6, 1))])
        design = np.vstack([np.column_stack([x, np.ones(40)]), penalty])
        expected = np.linalg.lstsq(design, np.append(y, np.zeros(6)), rcond=None)[0]
        np.testing.assert_allclose(weights[:, k], expected, rtol=1e-9)


@pytest.mark.parametrize("noise", [0, 1], ids=["separable", "noisy"])
def test_logistic_minimises_its_objective(noise):
    x = RNG.normal(size=(80, 4))
    y = (x[:, 0] + noise * RNG.normal(size=80) > 0.3).astype(float)
    weights = evaluate.logistic(x, y, np.array([0.1, 10.0]))

    def objective(w, alpha):
        z = x @ w[:-1] + w[-1]
        return (np.logaddexp(0, z) - y * z).sum() + alpha / 2 * w[:-1] @ w[:-1]

    for k, alpha in enumerate((0.1, 10.0)):
        best = optimize.minimize(objective, np.zeros(5), alpha, tol=1e-10)
        np.testing.assert_allclose(weights[:, k], best.x, atol=1e-3)
        assert objective(weights[:, k], alpha) <= best.fun + 1e-7


def test_r2_is_measured_against_the_training_mean():
    # squared errors 0, 1, 1; squared distances from the mean 2 of other subjects 1, 0, 4
    counts = np.array([[1, 1, 1], [2, 0, 1]])
    r2 = evaluate.r2_samples(np.array([1.0, 2, 4]), np.array([1.0, 3, 3]), 2.0, counts)
    np.testing.assert_allclose(r2, [1 - 2 / 5, 1 - 1 / 6])


def test_auroc_counts_pairs_and_half_the_ties():
    y = RNG.integers(0, 2, 60).astype(float)
    score = RNG.integers(0, 8, 60) / 8
    counts = evaluate.bootstrap_counts(60, 3, 0)
    assert (counts[0] == 1).all() and (counts.sum(1) == 60).all()
    for row, auroc in zip(counts, evaluate.auroc_samples(y, score, counts), strict=True):
        drawn = np.repeat(np.arange(60), row.astype(int))
        positive = score[drawn[y[drawn] == 1]]
        negative = score[drawn[y[drawn] == 0]]
        pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
        assert auroc == pytest.approx(np.mean(pairs))


def test_average_precision_by_hand():
    y = np.array([1.0, 0, 1, 0])
    precision = evaluate.average_precision(y, np.array([0.9, 0.8, 0.7, 0.1]))
    assert precision == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert evaluate.average_precision(y, np.zeros(4)) == pytest.approx(0.5)  # ties: the prevalence


def test_groups_are_means_over_their_phenotypes(problem):
    scores = probe(*problem)
    lvm = scores.samples["LVM_g"]
    lvef = scores.samples["LVEF_pct"]
    for group, samples in {"structural": lvm, "functional": lvef, "all": (lvm + lvef) / 2}.items():
        assert scores.groups[group]["r2"] == pytest.approx(samples[0])
        np.testing.assert_allclose(
            scores.groups[group]["r2_ci"], np.percentile(samples, [2.5, 97.5])
        )
    names = "LVEDV_ml LVESV_ml LVSVi_ml_m2 LVEF_pct LVM_g LVCO_l_min LEFT_atrium_ml GLS_pct"
    groups = evaluate.group_phenotypes(names.split())
    assert groups["structural"] == ["LVEDV_ml", "LVM_g", "LEFT_atrium_ml"]


def test_differences_are_paired(problem):
    x, cohort = problem
    noise = np.random.default_rng(4).normal(size=x.shape)
    a = probe(x, cohort)
    b = probe(x + 0.3 * noise, cohort)
    for entry in evaluate.compare(a, a).values():
        assert set(entry) <= {"difference", "ci", "relative", "relative_ci"}
        assert not np.any([*entry.values()][0]) and entry["ci"] == [0, 0]
    gain = evaluate.compare(a, b)["structural"]
    r2_a = a.groups["structural"]
    r2_b = b.groups["structural"]
    assert gain["difference"] == pytest.approx(r2_a["r2"] - r2_b["r2"])
    relative = a.samples["structural"] / b.samples["structural"] - 1
    assert gain["relative"] == relative[0] == r2_a["r2"] / r2_b["r2"] - 1
    np.testing.assert_allclose(gain["relative_ci"], np.percentile(relative, [2.5, 97.5]))
    # the same resamples on both sides: narrower than an interval of either
    assert np.ptp(gain["ci"]) < min(np.ptp(r2_a["r2_ci"]), np.ptp(r2_b["r2_ci"]))
    # nothing is told relative to what may be nothing
    assert "relative" not in evaluate.compare(a, probe(noise, cohort))["functional"]


def test_retrieval_by_hand():
    # ECG 0 finds heart 0 first; ECG 1 after heart 2; ECG 2 after both others
    similarity = torch.tensor([[0.9, 0.1, 0.3], [0.0, 0.5, 0.8], [0.4, 0.3, 0.1]])
    directions = evaluate.retrieval({"ecg": similarity, "ed": torch.eye(3)}, np.arange(3))
    assert directions.keys() == {"ecg_to_ed", "ed_to_ecg"}
    found = directions["ecg_to_ed"]
    assert found["recall@1"] == pytest.approx(1 / 3) and found["recall@5"] == 1
    assert (found["median_rank"], found["chance_rank"], found["n"]) == (2, 2, 3)


def test_retrieval_intervals_are_exact():
    found = evaluate.score_ranks(RNG.permutation(100) + 1)
    assert found["recall@5"] == found["chance@5"] == 0.05
    exact = stats.beta.ppf(0.025, 5, 96), stats.beta.ppf(0.975, 6, 95)  # Clopper and Pearson
    np.testing.assert_allclose(found["recall@5_ci"], exact)
    assert found["median_rank_ci"] == [40, 61]  # binomial order statistics of 100


# ---------------------------------------------------------------- honesty


@pytest.mark.parametrize("target", ["LVEF_pct", "sick"])
def test_alpha_is_chosen_on_validation_and_test_is_never_looked_at(problem, target):
    x, cohort = problem
    indices = splits(cohort)
    y = cohort.columns[target]
    binary = target == "sick"
    val = indices["val"]
    errors = []
    for alpha in evaluate.ALPHAS:
        solve = evaluate.logistic if binary else evaluate.ridge
        w = solve(x[indices["train"]], y[indices["train"]], np.array([alpha]))[:, 0]
        z = x[val] @ w[:-1] + w[-1]
        losses = np.logaddexp(0, z) - y[val] * z if binary else (z - y[val]) ** 2
        errors.append(losses.mean())
    weights, alpha = evaluate.fit_probe(x, y, indices, binary)
    assert errors[list(evaluate.ALPHAS).index(alpha)] == pytest.approx(min(errors), rel=1e-6)
    changed = y.copy()
    changed[indices["test"]] = 1 - changed[indices["test"]]
    again, _ = evaluate.fit_probe(x, changed, indices, binary)
    np.testing.assert_array_equal(weights, again)


def test_missing_and_constant_labels_cost_only_their_own_target(problem):
    x, cohort = problem
    alone = probe(x, cohort).metrics
    cohort.columns["LVM_g"][::2] = np.nan
    cohort.columns["never_g"] = np.full(300, np.nan)
    cohort.columns["same_g"] = np.full(300, 7.0)
    metrics = probe(x, cohort, list(cohort.columns)).metrics
    assert metrics.keys() == {"LVM_g", "LVEF_pct", "sick"}
    assert metrics["LVM_g"]["n_test"] == 30
    assert metrics["LVEF_pct"] == alone["LVEF_pct"] and metrics["sick"] == alone["sick"]


def test_label_draws_keep_their_budget_and_are_the_same_for_all(problem, monkeypatch):
    x, cohort = problem
    cohort.columns["LVM_g"][:50] = np.nan
    cohort.columns["LVEF_pct"][:50] = np.nan
    used = []
    fit_probe = evaluate.fit_probe

    def spy(x, y, indices, binary):
        drawn = np.concatenate([indices["train"], indices["val"]])
        used.append(tuple(drawn))
        hidden = np.full_like(y, np.nan)
        hidden[drawn] = y[drawn]
        return fit_probe(x, hidden, indices, binary)  # knows no label outside the draw

    monkeypatch.setattr(evaluate, "fit_probe", spy)
    methods = [evaluate.Method(name, "run", name, x * k) for k, name in enumerate("ab", 1)]
    args = argparse.Namespace(labels=["25", "all"], seed=0)
    records = evaluate.label_curve(methods, cohort, splits(cohort), args, "cpu")
    few = used[: 10 * 2 * 2]  # draws, methods, phenotypes
    assert len(set(few)) == 10 and {len(drawn) for drawn in few} == {25}
    assert all(len(set(drawn)) == 25 for drawn in few)
    assert all(min(drawn) >= 50 for drawn in few)  # those with a label
    assert not set(np.concatenate(few)) & set(cohort.indices("test"))
    curve = evaluate.summarise_curve(records)
    assert curve["25"]["a"]["LVEF_pct"] == pytest.approx(curve["25"]["b"]["LVEF_pct"])
    assert records == evaluate.label_curve(methods, cohort, splits(cohort), args, "cpu")
    chosen = [r for r in records if (r["labels"], r["method"], r["target"]) == ("25", "a", "all")]
    r2 = [record["r2"] for record in chosen]
    assert np.std(r2) > 0
    expected = {"r2": np.mean(r2), "sd": np.std(r2), "draws": 10}
    assert curve["25"]["a"]["all"] == pytest.approx(expected)
    assert curve["all"]["a"]["all"]["draws"] == 1


def test_supervised_loss_by_hand():
    outputs = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    labels = torch.tensor([[3.0, 1.0], [math.nan, math.nan]])
    loss = evaluate.supervised_loss(outputs, labels, n_phenotypes=1)
    assert loss.item() == pytest.approx((2**2 + math.log(2)) / 2)


def test_supervised_training_learns_from_its_labels_alone(cohort):
    train = cohort.indices("train")[:20]
    outputs = evaluate.train_supervised(cohort, {"train": train}, 0, "cpu")
    blind = {name: np.full(64, np.nan) for name in cohort.columns}
    for name, values in cohort.columns.items():
        blind[name][train] = values[train]
    blind = dataclasses.replace(cohort, columns=blind)
    again = evaluate.train_supervised(blind, {"train": train}, 0, "cpu")
    np.testing.assert_array_equal(outputs, again)
    labels = np.column_stack([cohort.columns[name][train] for name in cohort.phenotypes])
    correlations = [np.corrcoef(outputs[train, k], labels[:, k])[0, 1] for k in range(8)]
    assert np.mean(correlations) > 0.7


def test_features_are_frozen_and_finite(cohort):
    model = models.build(argparse.Namespace(views=["ed"], slices=12))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features = evaluate.frozen_features(model, cohort, ("ecg", "ed"), "cpu")
    assert features["ecg"].shape == features["ed"].shape == (64, 128)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.encoders["ecg"].stem.bias.data[3] = math.nan
    with pytest.raises(data.InputError, match="not finite"):
        evaluate.frozen_features(model, cohort, ("ecg",), "cpu")


def test_conformal_interval_covers_as_announced():
    assert evaluate.conformal_half_width(np.arange(400.0), np.arange(19)) is None
    covered = []
    for seed in range(200):
        errors = np.abs(np.random.default_rng(seed).normal(size=240))
        half_width = evaluate.conformal_half_width(errors, np.arange(40))
        covered.append((errors[40:] <= half_width).mean())
    assert 0.945 < np.mean(covered) < 0.98


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def evaluated(cohort, run_script, tmp_path_factory):
    """evaluate.py on two untrained runs: the eval folder, metrics.json and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "dual", cohort), make_run(folder / "ed2d", cohort, ["ed"], 1)]
    out = runs[0] / "eval"
    out.mkdir()
    (out / "views.png").write_text("of an earlier evaluation")
    options = ["--labels", 20, "all", "--supervised", "--bootstrap", 100]
    result = run_script("evaluate.py", *runs, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    return out, metrics, result


def test_everything_is_written(evaluated):
    out, _, result = evaluated
    names = "probe latents views labels scatter gallery".split()
    assert {path.stem for path in out.glob("*.png")} == set(names)
    assert all(path.stat().st_size < 300_000 for path in out.glob("*.png"))
    assert (out / "table.md").read_text() in result.stdout and f"wrote {out}" in result.stdout
    assert (out / "labels.csv").read_text().startswith("labels,draw,method,target,r2\n20,0,dual,")


def test_shape_of_metrics(evaluated):
    """metrics.json as the design has it."""
    metrics = evaluated[1]
    runs = {"dual", "ed2d"}
    baselines = {"mean", "covariates", "covariates+dual", "random_encoder", "supervised"}
    methods = runs | baselines | {"dual.ed", "dual.es", "dual.ed+es", "ed2d.ed"}
    directions = {"ecg_to_ed", "ed_to_ecg", "ecg_to_es", "es_to_ecg", "ed_to_es", "es_to_ed"}
    ranks = {"recall@1", "recall@1_ci", "recall@5", "recall@10", "median_rank", "chance_rank", "n"}
    probe = metrics["probe"]["dual"]
    curve = metrics["labels"]
    for table, keys in (
        (metrics, {"probe", "groups", "paired", "retrieval", "labels"}),
        (metrics["probe"], methods),
        (metrics["groups"], methods),
        (probe["LVEF_pct"], {"r2", "r2_ci", "pearson", "mae", "n_test", "alpha"}),
        (probe["hypertension"], {"auroc", "auroc_ci", "auprc", "prevalence", "n_test", "alpha"}),
        (metrics["groups"]["dual"], {"structural", "functional", "all"}),
        (metrics["groups"]["ed2d.ed"]["all"], {"r2", "r2_ci"}),
        (metrics["paired"], {f"dual-{name}" for name in baselines | {"ed2d"}}),
        (metrics["paired"]["dual-mean"]["LVEF_pct"], {"difference", "ci"}),
        (metrics["retrieval"]["dual"], directions),
        (curve, {"20", "all"}),
        (curve["20"], runs | {"covariates", "random_encoder", "supervised"}),
        (curve["20"]["dual"]["all"], {"r2", "sd", "draws"}),
    ):
        assert table.keys() == keys
    assert ranks < metrics["retrieval"]["ed2d"]["ecg_to_ed"].keys()
    assert curve["20"]["supervised"]["LVEF_pct"]["draws"] == 3
    r2 = metrics["groups"]["supervised"]["all"]["r2"]
    assert curve["all"]["supervised"]["all"]["r2"] == pytest.approx(r2)


def test_scores_can_be_recomputed_from_the_files(evaluated, cohort):
    """R² of every method by another way, from features.npz and alpha alone."""
    out, metrics, _ = evaluated
    arrays = np.load(out / "features.npz")
    assert list(arrays["id"]) == list(cohort.ids)
    train = arrays["split"] == "train"
    test = arrays["split"] == "test"
    for name, probes in metrics["probe"].items():
        std = arrays[name][train].std(0, dtype=float)
        x = (arrays[name] - arrays[name][train].mean(0, dtype=float)) / np.where(std > 1e-9, std, 1)
        for target in cohort.phenotypes:
            y = cohort.columns[target] - cohort.columns[target][train].mean()
            normal = x[train].T @ x[train] + probes[target]["alpha"] * np.eye(x.shape[1])
            error = y[test] - x[test] @ np.linalg.solve(normal, x[train].T @ y[train])
            r2 = 1 - (error**2).sum() / (y[test] ** 2).sum()
            assert probes[target]["r2"] == pytest.approx(r2, abs=1e-6), (name, target)


def test_prediction_from_raw_ecgs(evaluated, run_script, tmp_path):
    synthetic.write_raw(tmp_path / "raw", subjects=5, seed=5)
    with open(tmp_path / "raw" / "manifest.csv") as file:
        rows = list(csv.DictReader(file))
    (tmp_path / "raw" / rows[1]["ecg"]).write_text("rubbish")
    rows += [{"id": "absent", "ecg": "absent.xml"}, {"id": "none", "ecg": ""}]
    data.write_csv(tmp_path / "raw" / "new.csv", ["id", "ecg", "ecg_hz"], rows)
    options = ["--predict", tmp_path / "raw" / "new.csv"]
    result = run_script("evaluate.py", evaluated[0].parent, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows[1]["ecg"] in result.stderr and "absent.xml" in result.stderr
    assert "names no ECG; fill it in" in result.stderr
    assert "4 predicted, 3 rejected" in result.stdout
    assert result.stdout.endswith("Research use only, not for diagnosis.\n")
    with open(tmp_path / "raw" / "predictions.csv") as file:
        predicted = list(csv.DictReader(file))
    assert [row["id"] for row in predicted] == [rows[k]["id"] for k in (0, 2, 3, 4)]
    assert all(20 < float(row["LVEF_pct"]) < 90 for row in predicted)
    assert all(0 <= float(row["hypertension_probability"]) <= 1 for row in predicted)
    assert "LVEF_pct_low" not in predicted[0] and "no interval" in result.stderr  # 6 in val


def edit_cohort(source, folder, edit):
    """A copy of a cohort whose subjects.csv is edited row by row."""
    shutil.copytree(source, folder)
    with open(folder / "subjects.csv") as file:
        rows = [edit(k, row) for k, row in enumerate(csv.DictReader(file))]
    data.write_csv(folder / "subjects.csv", list(rows[0]), rows)
    return data.open_cohort(folder)


def keep(*names):
    return lambda k, row: {name: row[name] for name in ("id", "split", *names)}


STRANGE = {
    "nothing to probe": keep(),
    "no covariates": keep("LVM_g"),
    "only outcomes": keep("hypertension"),
    "missing values": lambda k, row: {**row, "LVEF_pct": row["LVEF_pct"] * (k % 3 == 0), "age": ""},
    "strange names": lambda k, row: {**row, "a|b_$x$_ml": row["LVM_g"], "same_g": "7"},
}


def test_a_column_named_as_a_group_is_refused(cohort, tmp_path, run_script):
    run = make_run(tmp_path / "es", cohort, ["es"])
    edit_cohort(cohort.folder, tmp_path / "cohort", lambda k, row: {**row, "all": row["LVM_g"]})
    result = run_script("evaluate.py", run, "--data", tmp_path / "cohort", cwd=tmp_path)
    assert result.returncode == 2 and "has columns ['all']" in result.stderr


@pytest.mark.parametrize("case", STRANGE)
def test_strange_cohorts_are_evaluated(cohort, tmp_path, run_script, case):
    run = make_run(tmp_path / "es", cohort, ["es"])
    cohort = edit_cohort(cohort.folder, tmp_path / "cohort", STRANGE[case])
    options = ["--data", cohort.folder, "--bootstrap", 20]
    result = run_script("evaluate.py", run, *options, cwd=tmp_path)
    assert "trained on another cohort" in result.stderr
    assert result.returncode == 0 and (run / "eval" / "gallery.png").exists(), result.stderr
    metrics = json.loads((run / "eval" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert set(metrics["probe"]["es"]) <= {*cohort.phenotypes, *cohort.outcomes}
    table = (run / "eval" / "table.md").read_text()
    assert not any(
        set(line.replace(" ", "").split("|")[2:-1]) == {"-"} for line in table.split("\n")
    )
    assert ("covariates" in metrics["probe"]) == (case in ("missing values", "strange names"))
    if case == "strange names":
        assert "a|b_$x$_ml" in metrics["probe"]["es"] and r"a\|b_$x$_ml" in table
        assert "same_g is left out" in result.stderr


class Evil:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


FAULTS = {
    "absent": lambda best: best.unlink(),
    "cut": lambda best: best.write_bytes(best.read_bytes()[:100_000]),
    "pickle": lambda best: best.write_bytes(pickle.dumps(Evil())),
    "foreign": lambda best: torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, best),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_runs_are_refused(cohort, tmp_path, run_script, recwarn, fault):
    run = make_run(tmp_path / "run", cohort)
    FAULTS[fault](run / "best.pt")
    result = run_script("evaluate.py", run, cwd=tmp_path)
    assert result.returncode == 2 and not result.stdout and not recwarn.list
    assert len(result.stderr.splitlines()) == 1 and str(run) in result.stderr


REFUSED = {
    "--labels 5": "20",
    "--labels many": "many",
    "--labels 9999": "43",
    "--labels 5²": "5²",
    "--bootstrap 0": "100000",
    f"--seed {2**64}": "must be from 0 to",
    "--data nowhere": "nowhere",
    "--predict nowhere.csv": "nowhere.csv",
    "--predict predictions.csv": "overwritten",
    "--predict link.csv": "overwritten",
    "other/run": "share a name",
    "mean": "share a name",
    "run.ed": "share a name",
    "other/run --predict new.csv": "RUN",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_wrong_arguments_are_refused_in_one_sentence(cohort, tmp_path, run_script, arguments):
    run = make_run(tmp_path / "run", cohort, ["ed"])
    make_run(tmp_path / "other" / "run", cohort, ["ed"])
    for name in ("mean", "run.ed"):
        make_run(tmp_path / name, cohort, ["ed"])
    (tmp_path / "predictions.csv").write_text("id,ecg\n1,1.xml\n")
    (tmp_path / "link.csv").symlink_to("predictions.csv")
    result = run_script("evaluate.py", run, *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2 and REFUSED[arguments] in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert (tmp_path / "predictions.csv").read_text() == "id,ecg\n1,1.xml\n"
