"""Probes and scores against written-out formulas, honesty of the protocol, and the command."""

import csv
import json
import pickle
from functools import partial

import calibrate
import numpy as np
import pytest
import torch
from scipy import optimize

import data
import evaluate
import models

RNG = np.random.default_rng(0)


def make_run(folder, cohort, phases=("ed", "es"), **changes):
    """A run folder with an untrained model, as train.py would leave it."""
    torch.manual_seed(0)
    state = {"model": models.DualPhase(phases).state_dict(), "optimizer": {}, "epoch": 1}
    state["args"] = {"phases": list(phases), "data": str(cohort["folder"])}
    state |= {"cohort": cohort["fingerprint"], "grid": list(cohort["grid"])} | changes
    folder.mkdir(parents=True)
    torch.save(state, folder / "best.pt")
    return folder


def split_rows(cohort):
    return {name: np.flatnonzero(cohort["split"] == name) for name in ("train", "val", "test")}


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return data.open_cohort(cohort_folder)


@pytest.fixture(scope="module")
def problem():
    """Features that know a little of a phenotype and an outcome; 180 train, 60 val, 60 test."""
    x = np.random.default_rng(1).normal(size=(300, 8))
    y = x[:, 0] + np.random.default_rng(2).normal(size=300)
    columns = {"LVEF_pct": y * 5 + 60, "sick": (y > 0.5).astype(float)}
    split = np.array(["train", "train", "train", "val", "test"] * 60)
    table = {"phenotypes": ["LVEF_pct"], "outcomes": ["sick"], "columns": columns, "split": split}
    return {"x": x, "cohort": table, "rows": split_rows(table)}


# ---------------------------------------------------------------- formulas


def test_ridge_solves_the_normal_equations():
    x, y = RNG.normal(size=(40, 6)) + 1, RNG.normal(size=40) + 3
    got = evaluate.ridge(x, y, np.array([0.1, 10.0]))
    center = x.mean(0)
    for k, alpha in enumerate((0.1, 10.0)):
        a = (x - center).T @ (x - center) + alpha * np.eye(6)
        wanted = np.linalg.solve(a, (x - center).T @ (y - y.mean()))
        np.testing.assert_allclose(got[:-1, k], wanted, rtol=1e-9)
        np.testing.assert_allclose(got[-1, k], y.mean() - center @ wanted, rtol=1e-9)


@pytest.mark.parametrize("separable", [False, True])
def test_logistic_minimises_its_objective(separable):
    x = RNG.normal(size=(80, 4))
    y = (x[:, 0] + (0 if separable else 1) * RNG.normal(size=80) > 0.3).astype(float)
    got = evaluate.logistic(x, y, np.array([0.1, 10.0]))

    def objective(w, alpha):
        z = x @ w[:-1] + w[-1]
        return (np.logaddexp(0, z) - y * z).sum() + alpha / 2 * w[:-1] @ w[:-1]

    for k, alpha in enumerate((0.1, 10.0)):
        best = optimize.minimize(objective, np.zeros(5), alpha, tol=1e-10)
        np.testing.assert_allclose(got[:, k], best.x, atol=1e-3)
        assert objective(got[:, k], alpha) <= best.fun + 1e-7


def test_r2_is_measured_against_the_training_mean():
    y, p = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 3.0])
    # squared errors 0, 1, 1; squared distances from the mean 2 of other subjects 1, 0, 4
    assert evaluate.r2(y, p, 2.0, np.ones((1, 3))) == pytest.approx(1 - 2 / 5)
    assert evaluate.r2(y, p, 2.0, np.array([[2, 0, 1]])) == pytest.approx(1 - 1 / 6)


def test_auroc_counts_pairs_and_half_the_ties():
    y, score = RNG.integers(0, 2, 60).astype(float), RNG.integers(0, 8, 60) / 8
    counts = evaluate.resamples(60, 3, 0)
    for row, got in zip(counts, evaluate.auroc(y, score, counts), strict=True):
        drawn = np.repeat(np.arange(60), row.astype(int))
        positive, negative = (score[drawn[y[drawn] == k]] for k in (1, 0))
        wins = positive[:, None] > negative
        ties = positive[:, None] == negative
        assert got == pytest.approx((wins + ties / 2).mean())
    assert np.isnan(evaluate.auroc(np.ones(3), np.arange(3.0), np.ones((1, 3))))


def test_average_precision_by_hand():
    y, score = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    assert evaluate.average_precision(y, score) == pytest.approx((1 / 1 + 2 / 3) / 2)
    # one level of ties: precision is the prevalence
    assert evaluate.average_precision(y, np.zeros(4)) == pytest.approx(0.5)


def test_bootstrap_intervals_cover_as_announced():
    hits, n = 0, 60
    for trial in range(200):
        y = np.random.default_rng(trial).normal(size=n)
        p = 0.5 * y + np.random.default_rng([trial, 1]).normal(size=n) * 0.5
        samples = evaluate.r2(y, p, 0.0, evaluate.resamples(n, 200, trial))
        low, high = evaluate.summary(samples, "r2")["r2_ci"]
        hits += low <= 0.5 <= high  # 1 - (0.25 + 0.25) / 1
    assert 0.88 <= hits / 200 <= 0.99


def test_metrics_of_a_probe(problem):
    x, cohort, rows = problem["x"], problem["cohort"], problem["rows"]
    counts = evaluate.resamples(len(rows["test"]), 50, 0)
    got = evaluate.probe(x, cohort, rows, counts)
    y, p = cohort["columns"]["LVEF_pct"][rows["test"]], got["predictions"]["LVEF_pct"][rows["test"]]
    found = got["probe"]["LVEF_pct"]
    assert found["mae"] == pytest.approx(np.abs(y - p).mean())
    assert found["pearson"] == pytest.approx(np.corrcoef(y, p)[0, 1])
    assert found["n_test"] == 60 and 0.2 < found["r2"] < 0.7
    assert got["outcomes"]["sick"]["prevalence"] == cohort["columns"]["sick"][rows["test"]].mean()
    assert got["groups"].keys() == {"functional"}


def test_difference_of_a_probe_with_itself_is_nothing(problem):
    counts = evaluate.resamples(60, 50, 0)
    got = evaluate.probe(problem["x"], problem["cohort"], problem["rows"], counts)
    table = evaluate.compare(got, got)
    assert table["paired"]["LVEF_pct"] == {"delta_r2": 0, "ci": [0, 0]}
    assert table["paired_outcomes"]["sick"] == {"delta_auroc": 0, "ci": [0, 0]}
    assert table["relative"]["functional"] == {"relative": 0, "ci": [0, 0]}


def test_groups_by_name():
    names = ["LVEDV_ml", "LVESV_ml", "LVSV_ml", "LVEF_pct", "LVM_g", "RVEF_pct", "LEFT_atrium_ml"]
    got = evaluate.groups(names)
    assert got["structural"] == ["LVEDV_ml", "LVM_g", "LEFT_atrium_ml"]


# ---------------------------------------------------------------- honesty


@pytest.mark.parametrize("target", ["LVEF_pct", "sick"])
def test_alpha_is_chosen_on_validation(problem, target):
    x, rows, y = problem["x"], problem["rows"], problem["cohort"]["columns"][target]
    binary, errors = target == "sick", []
    for alpha in evaluate.ALPHAS:
        solve = evaluate.logistic if binary else evaluate.ridge
        w = solve(x[rows["train"]], y[rows["train"]], np.array([alpha]))[:, 0]
        z, truth = x[rows["val"]] @ w[:-1] + w[-1], y[rows["val"]]
        loss = np.logaddexp(0, z) - truth * z if binary else (z - truth) ** 2
        errors.append(loss.mean())
    got = evaluate.fit(x, y, rows, binary)["alpha"]
    assert errors[list(evaluate.ALPHAS).index(got)] == pytest.approx(min(errors), rel=1e-6)


@pytest.mark.parametrize("target", ["LVEF_pct", "sick"])
def test_test_labels_change_no_prediction(problem, target):
    x, rows, y = problem["x"], problem["rows"], problem["cohort"]["columns"][target]
    shuffled = y.copy()
    shuffled[rows["test"]] = np.nan
    a, b = (evaluate.fit(x, labels, rows, target == "sick") for labels in (y, shuffled))
    np.testing.assert_array_equal(a["prediction"], b["prediction"])
    assert a["alpha"] == b["alpha"] and a["mean"] == b["mean"]


def test_missing_labels_cost_only_their_own_target(problem):
    cohort, rows = problem["cohort"], problem["rows"]
    sparse = cohort["columns"]["LVEF_pct"].copy()
    sparse[::2] = np.nan
    columns = cohort["columns"] | {"LVM_g": sparse, "never": np.full(300, np.nan)}
    columns["healthy"] = np.zeros(300)
    table = cohort | {"columns": columns, "phenotypes": ["LVEF_pct", "LVM_g", "never"]}
    table["outcomes"] = ["sick", "healthy"]
    counts = evaluate.resamples(60, 50, 0)
    got = evaluate.probe(problem["x"], table, rows, counts)
    assert got["probe"]["LVEF_pct"]["n_test"] == 60 and got["probe"]["LVM_g"]["n_test"] == 30
    assert got["probe"].keys() == {"LVEF_pct", "LVM_g"} and got["outcomes"].keys() == {"sick"}
    alone = evaluate.probe(problem["x"], cohort, rows, counts)
    assert alone["probe"]["LVEF_pct"] == got["probe"]["LVEF_pct"]


def test_label_draws_never_exceed_their_budget():
    train = np.arange(100, 300)
    for count in (20, 50, 199):
        draw = evaluate.draw_labels(train, count, [0, count, 1])
        both = np.concatenate([draw["train"], draw["val"]])
        assert len(both) == len(set(both)) == count and set(both) <= set(train)
        assert len(draw["val"]) == count // 5


def test_label_curve_looks_at_its_draw_alone(problem, monkeypatch):
    """Labels outside the draw may be missing: only those of the draw, and test's score, count."""
    cohort, rows, seen = problem["cohort"], problem["rows"], []
    real = evaluate.fit

    def spy(x, y, chosen, binary):
        seen.append(np.concatenate([chosen["train"], chosen["val"]]))
        return real(x, y, chosen, binary)

    monkeypatch.setattr(evaluate, "fit", spy)
    curve = evaluate.label_curve({"dual": problem["x"]}, cohort, rows, ["20", "all"], "cpu", 0)
    assert [len(s) for s in seen] == [20] * 10 + [240]
    assert curve["20"]["dual"]["LVEF_pct"]["draws"] == 10 and curve["20"]["dual"]["LVEF_pct"]["sd"]
    assert curve["all"]["dual"]["LVEF_pct"]["r2"] > curve["20"]["dual"]["LVEF_pct"]["r2"]


@pytest.mark.parametrize("spoil", ["buffer", "parameter"])
def test_frozen_means_frozen(cohort, monkeypatch, spoil):
    model = models.DualPhase(())
    head = model.heads["ecg"]
    victim = head.norm.running_mean if spoil == "buffer" else head.linear.weight
    plain = model.embed

    def embed(features):
        victim.data.add_(1)
        return plain(features)

    evaluate.extract(model, cohort, "cpu")
    monkeypatch.setattr(model, "embed", embed)
    with pytest.raises(RuntimeError, match="frozen"):
        evaluate.extract(model, cohort, "cpu")


def test_chance_lies_inside_the_interval_of_random_embeddings():
    inside = []
    for seed in range(20):
        torch.manual_seed(seed)
        z = {name: torch.randn(150, 16) for name in ("ecg", "ed", "es")}
        got = evaluate.retrieval(z, np.arange(20, 120))
        assert got.keys() == set(evaluate.DIRECTIONS)
        for found in got.values():
            assert found["n"] == 100 and found["chance@5"] == 0.05
            for key in ("recall@1", "recall@5", "recall@10"):
                low, high = found[f"{key}_ci"]
                inside.append(low <= found[key.replace("recall", "chance")] <= high)
            inside.append(found["median_rank_ci"][0] <= 50.5 <= found["median_rank_ci"][1])
    assert np.mean(inside) > 0.93
    perfect = evaluate.retrieval({"ecg": z["ecg"], "ed": 10 * z["ecg"]}, np.arange(100))
    assert perfect["ecg_to_ed"]["recall@10"] == 1


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def evaluated(cohort, run_script, tmp_path_factory):
    """evaluate.py on two untrained runs: the folder of the first."""
    folder = tmp_path_factory.mktemp("runs")
    runs = make_run(folder / "dual", cohort), make_run(folder / "ed", cohort, ("ed",))
    arguments = "--labels", 20, "all", "--supervised", "--bootstrap", 100
    result = run_script("evaluate.py", *runs, *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return {"run": runs[0], "result": result}


def test_everything_is_written(evaluated):
    out = evaluated["run"] / "eval"
    names = {"metrics.json", "table.md", "features.npz"}
    names |= {f"{n}.png" for n in ("probe", "latents", "scatter", "labels", "gallery")}
    assert {path.name for path in out.iterdir()} == names
    assert all(path.stat().st_size < 300_000 for path in out.glob("*.png"))
    table = (out / "table.md").read_text()
    assert table.startswith("Synthetic cohort") and table in evaluated["result"].stdout


def test_layout_of_metrics(evaluated, cohort):
    metrics = json.loads((evaluated["run"] / "eval" / "metrics.json").read_text())
    assert metrics["runs"].keys() == {"dual", "ed"}
    run = metrics["runs"]["dual"]
    assert run.keys() >= {"probe", "outcomes", "retrieval", "latents"}
    keys = {"r2", "r2_ci", "pearson", "mae", "n_test", "alpha"}
    assert run["probe"].keys() == set(cohort["phenotypes"])
    assert all(found.keys() >= keys for found in run["probe"].values())
    keys = {"auroc", "auroc_ci", "auprc", "prevalence"}
    assert all(found.keys() >= keys for found in run["outcomes"].values())
    assert run["retrieval"].keys() == set(evaluate.DIRECTIONS)
    keys = {"recall@1", "recall@5", "recall@10", "median_rank", "n"}
    assert all(found.keys() >= keys for found in run["retrieval"].values())
    assert run["latents"].keys() == {"ed", "es", "ed+es"}
    assert run["latents"]["ed"].keys() == set(cohort["phenotypes"])
    names = {"mean", "covariates", "random_encoder", "supervised", "covariates+dual"}
    assert metrics["baselines"].keys() == metrics["baseline_outcomes"].keys() == names
    assert metrics["paired"].keys() == {"dual-ed"} | {f"dual-{name}" for name in names}
    assert metrics["paired"]["dual-ed"]["LVEF_pct"].keys() == {"delta_r2", "ci"}
    assert metrics["labels"].keys() == {"20", "all"}
    assert metrics["labels"]["20"].keys() == {"dual", "ed", "random_encoder", "supervised"}
    assert metrics["labels"]["20"]["dual"]["LVEF_pct"].keys() >= {"r2", "sd"}
    assert all(abs(found["r2"]) < 1e-9 for found in metrics["baselines"]["mean"].values())


def test_scores_can_be_recomputed_from_the_files(evaluated, cohort):
    """An independent transcription from features.npz, subjects.csv and alpha agrees to 1e-3."""
    metrics = json.loads((evaluated["run"] / "eval" / "metrics.json").read_text())
    with open(cohort["folder"] / "subjects.csv") as file:
        table = {row["id"]: row for row in csv.DictReader(file)}
    arrays = np.load(evaluated["run"] / "eval" / "features.npz")
    assert list(arrays["id"]) == list(table) and list(arrays["split"]) == list(cohort["split"])
    train, test = (arrays["split"] == name for name in ("train", "test"))
    probes = {"ecg": metrics["runs"]["dual"], "ed.ecg": metrics["runs"]["ed"]}
    probes |= {
        k: {"probe": v} for k, v in metrics["runs"]["dual"]["latents"].items() if "+" not in k
    }
    for name, found in metrics["baselines"].items():
        probes[name] = {"probe": found, "outcomes": metrics["baseline_outcomes"][name]}
    for name, found in probes.items():
        x = arrays[name].astype(float)
        std = x[train].std(0)
        x = (x - x[train].mean(0)) / np.where(std > 0, std, 1)
        for target, score in (found["probe"] | found.get("outcomes", {})).items():
            y = np.array([float(table[i][target]) for i in arrays["id"]])
            alpha, mean = score["alpha"], y[train].mean()
            if "r2" in score:
                a = x[train].T @ x[train] + alpha * np.eye(x.shape[1])
                p = x[test] @ np.linalg.solve(a, x[train].T @ (y[train] - mean)) + mean
                r2 = 1 - ((y[test] - p) ** 2).sum() / ((y[test] - mean) ** 2).sum()
                assert score["r2"] == pytest.approx(r2, abs=1e-3), (name, target)
                continue
            n = len(x[0])

            def objective(w, x=x, y=y, alpha=alpha, n=n):
                z = x[train] @ w[:n] + w[n]
                slope = 1 / (1 + np.exp(-z)) - y[train]
                value = (np.logaddexp(0, z) - y[train] * z).sum() + alpha / 2 * w[:n] @ w[:n]
                return value, np.append(slope @ x[train] + alpha * w[:n], slope.sum())

            w = optimize.minimize(objective, np.zeros(n + 1), jac=True, options={"gtol": 1e-9}).x
            z = x[test] @ w[:n]
            z = np.round(z / max(np.ptp(z), 1e-12), 6)  # ties up to rounding
            pairs = np.sign(z[y[test] == 1][:, None] - z[y[test] == 0])
            assert score["auroc"] == pytest.approx((pairs.mean() + 1) / 2, abs=1e-3), (name, target)


def test_prediction_from_ecgs_alone(evaluated, run_script, tmp_path):
    data.write_demo(tmp_path / "demo", subjects=4, seed=5)
    with open(tmp_path / "demo" / "manifest.csv") as file:
        rows = [{"id": row["id"], "ecg": row["ecg"]} for row in csv.DictReader(file)]
    (tmp_path / "demo" / rows[1]["ecg"]).write_text("rubbish")
    rows.append({"id": "absent", "ecg": "absent.xml"})
    data.write_csv(tmp_path / "demo" / "new.csv", ["id", "ecg"], rows)
    arguments = evaluated["run"], "--predict", tmp_path / "demo" / "new.csv"
    result = run_script("evaluate.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows[1]["ecg"] in result.stderr and "absent.xml" in result.stderr
    assert "not for diagnosis" in result.stdout and "3 predicted, 2 rejected" in result.stdout
    with open(tmp_path / "demo" / "predictions.csv") as file:
        predicted = list(csv.DictReader(file))
    assert [row["id"] for row in predicted] == [rows[k]["id"] for k in (0, 2, 3)]
    assert all(20 < float(row["LVEF_pct"]) < 90 for row in predicted)
    assert all(0 <= float(row["heart_failure_probability"]) <= 1 for row in predicted)
    assert "too few for an interval" in result.stderr  # 6 validation subjects


def test_predictions_never_replace_the_table_they_are_made_from(evaluated, run_script, tmp_path):
    (tmp_path / "predictions.csv").write_text("id,ecg\n1,1.xml\n")
    arguments = evaluated["run"], "--predict", tmp_path / "predictions.csv"
    result = run_script("evaluate.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and "would be overwritten" in result.stderr
    assert (tmp_path / "predictions.csv").read_text() == "id,ecg\n1,1.xml\n"


def test_predictions_never_replace_their_table_through_a_link(evaluated, run_script, tmp_path):
    (tmp_path / "predictions.csv").write_text("id,ecg\n1,1.xml\n")
    (tmp_path / "new.csv").symlink_to("predictions.csv")
    arguments = evaluated["run"], "--predict", tmp_path / "new.csv"
    result = run_script("evaluate.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and "would be overwritten" in result.stderr


def test_what_train_cannot_teach_does_not_choose_for_the_supervised_encoder(cohort):
    """No labels in val but of a column that is constant in train: the last epoch is taken."""
    rows = split_rows(cohort)
    columns = {name: cohort["columns"][name].copy() for name in ("LVEDV_ml", "LVM_g")}
    for column in columns.values():
        column[rows["val"]] = np.nan
    columns["scar_g"] = 1e-6 * np.isin(np.arange(64), rows["val"])
    strange = cohort | {"columns": columns, "phenotypes": [*columns], "outcomes": []}
    found = evaluate.train_supervised(strange, rows, torch.device("cpu"), 0, rates=(3e-3,))
    for k, name in enumerate(("LVEDV_ml", "LVM_g")):
        output, y = found["outputs"][rows["train"], k], columns[name][rows["train"]]
        assert np.corrcoef(output, y)[0, 1] > 0.9


def test_the_calibration_by_hand_still_runs(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "SUBJECTS", 40)
    calibrate.main()
    assert "| LVM_g | " in capsys.readouterr().out


def test_labels_are_drawn_among_the_labelled(cohort, monkeypatch):
    rows, drawn, draw = split_rows(cohort), [], evaluate.draw_labels
    few = rows["train"][:24]
    y = np.full(64, np.nan)
    y[few] = y[rows["test"]] = 1
    monkeypatch.setattr(
        evaluate, "draw_labels", lambda train, *more: drawn.append(train) or draw(train, *more)
    )
    strange = cohort | {"columns": {"LVM_g": y}, "phenotypes": ["LVM_g"], "outcomes": []}
    evaluate.label_curve({}, strange, rows, ["20"], "cpu", 0)
    assert len(drawn) == 10 and all(np.array_equal(train, few) for train in drawn)


def test_nothing_is_told_relative_to_a_baseline_that_may_be_nothing():
    """R^2 of 0.5 against one of 0.4, certain or not."""
    sure, vague = np.full(100, 0.4), np.append(0.4, np.linspace(-1, 1.8, 99))
    own = {"groups": {"functional": {}}, "samples": {"functional": np.full(100, 0.5)}}
    own |= {"probe": {}, "outcomes": {}}
    against = [own | {"samples": {"functional": samples}} for samples in (sure, vague)]
    found = [evaluate.compare(own, other)["relative"] for other in against]
    assert found[0]["functional"]["relative"] == pytest.approx(0.25) and found[1] == {}


def test_a_figure_of_five_phenotypes_has_five_frames():
    n, names = 30, ("LVM_g", "LVSV_ml", "LVEF_pct", "RVEF_pct", "RVSV_ml")
    y = np.random.default_rng(0).normal(size=n)
    result = {
        "probe": {name: {"r2": 1.0} for name in names},
        "predictions": dict.fromkeys(names, y),
    }
    table = {"columns": dict.fromkeys(names, y)}
    figure = evaluate.scatter(result, table, {"test": np.arange(n)}, "five")
    assert sum(axis.axison for axis in figure.axes) == 5


def test_prediction_interval_holds_for_about_95_percent(cohort, tmp_path, monkeypatch, capsys):
    """On many subjects with known error, the interval and the coverage it states are right."""
    n = 1000
    y = np.random.default_rng(0).normal(size=n)
    split = np.repeat(["train", "val", "test"], [300, 300, 400])
    table = cohort | {"columns": {"LVEF_pct": y}, "phenotypes": ["LVEF_pct"], "outcomes": []}
    x = y[:, None].repeat(128, 1) + np.random.default_rng(1).normal(size=(n, 1)) * 0.5
    monkeypatch.setattr(evaluate, "extract", lambda *a: {"features": {"ecg": x}})
    data.write_demo(tmp_path / "demo", subjects=1)
    run = {"model": models.DualPhase(())}
    rows = split_rows({"split": split})
    evaluate.predict(run, table, rows, tmp_path / "demo" / "manifest.csv", "cpu")
    covered = float(capsys.readouterr().out.split("holds for ")[1].split("%")[0])
    assert 92 <= covered <= 98
    with open(tmp_path / "demo" / "predictions.csv") as file:
        row = next(csv.DictReader(file))
    assert float(row["LVEF_pct_low"]) < float(row["LVEF_pct"]) < float(row["LVEF_pct_high"])


# ---------------------------------------------------------------- small cohorts, wrong input


def shrink(source, folder, count, edit=lambda table: table):
    """The first `count` subjects of a cohort under another name, subjects.csv edited."""
    folder.mkdir()
    for name in ("ecg", "ed", "es"):
        np.save(folder / f"{name}.npy", np.load(source / f"{name}.npy")[:count])
    (folder / "cohort.json").write_text((source / "cohort.json").read_text())
    with open(source / "subjects.csv") as file:
        table = edit(list(csv.DictReader(file))[:count])
    data.write_csv(folder / "subjects.csv", list(table[0]), table)
    return data.open_cohort(folder)


def splits(names):
    return lambda table: [row | {"split": name} for row, name in zip(table, names, strict=True)]


SMALL = {
    "all train": (6, splits(["train"] * 6)),
    "one test subject": (6, splits(["train"] * 4 + ["val", "test"])),
    "two test subjects": (20, splits(["train"] * 14 + ["val"] * 4 + ["test"] * 2)),
    "no training subjects": (6, splits(["test"] * 6)),
    "one subject": (1, splits(["train"])),
    "nothing to probe": (30, lambda t: [{k: row[k] for k in ("id", "split")} for row in t]),
    "no covariates": (30, lambda t: [{k: row[k] for k in ("id", "split", "LVM_g")} for row in t]),
    "only outcomes": (
        30,
        lambda t: [{k: row[k] for k in ("id", "split", "hypertension")} for row in t],
    ),
    "missing values": (30, lambda t: [r | {"LVEF_pct": "", "age": ""} if k % 3 else r
                                      for k, r in enumerate(t)]),
    "strange names": (30, lambda t: [row | {"a|b_$\\y$_ml": row["LVM_g"],
                                            "rare_g": "0" if row["split"] == "train" else str(k)}
                                     for k, row in enumerate(t)]),
    "one class": (30, lambda t: [row | {"heart_failure": "0", "hypertension": "1"} for row in t]),
}  # fmt: skip


@pytest.mark.parametrize("case", SMALL)
def test_small_cohorts_do_not_crash(cohort_folder, tmp_path, monkeypatch, capsys, case):
    count, edit = SMALL[case]
    cohort = shrink(cohort_folder, tmp_path / "cohort", count, edit)
    run = make_run(tmp_path / "es", cohort, ("es",))
    supervised = ["--supervised"] if case in ("missing values", "all train") else []
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--bootstrap", "20", *supervised])
    quick = partial(evaluate.train_supervised, rates=(1e-3,))
    monkeypatch.setattr(evaluate, "train_supervised", quick)
    assert evaluate.main() == 0
    metrics = json.loads((run / "eval" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert (run / "eval" / "features.npz").exists() and (run / "eval" / "table.md").exists()
    told = capsys.readouterr().err
    if case in ("all train", "one test subject", "no training subjects", "one subject"):
        assert metrics["runs"]["es"]["probe"] == {} and "LVEF_pct: left out" in told
    if case == "one class":
        assert metrics["runs"]["es"]["outcomes"].keys() <= {"atrial_fibrillation"}
        assert "heart_failure: left out" in told
    if case == "strange names":
        assert "a|b_$\\y$_ml" in metrics["runs"]["es"]["probe"] and "rare_g: left out" in told
        table = [line.replace("\\|", "") for line in (run / "eval" / "table.md").open()]
        table = [
            line.count("|") for line in table if "b_$\\y$_ml" in line or line.startswith("| R² ")
        ]
        assert table[0] == table[1]
    if case == "no covariates":
        assert "covariates" not in metrics["baselines"]


class Evil:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


FAULTS = ["absent", "rubbish", "cut", "pickle", "foreign", "grid"]


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_runs_are_refused(cohort, tmp_path, monkeypatch, capfd, recwarn, fault):
    run = make_run(tmp_path / "run", cohort, **({"grid": [12, 64, 64]} if fault == "grid" else {}))
    best = run / "best.pt"
    if fault == "absent":
        best.unlink()
    elif fault == "rubbish":
        best.write_bytes(b"rubbish" * 100)
    elif fault == "cut":
        best.write_bytes(best.read_bytes()[:100_000])
    elif fault == "pickle":
        best.write_bytes(pickle.dumps(Evil()))
    elif fault == "foreign":
        torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, best)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run)])
    with pytest.raises(SystemExit) as stop:
        data.exit_cleanly(evaluate.main)
    told = capfd.readouterr()
    assert stop.value.code == 2 and not recwarn.list and not told.out
    assert len(told.err.splitlines()) == 1 and str(run) in told.err


@pytest.mark.parametrize(
    "arguments",
    [["--labels", "5"], ["--labels", "many"], ["--labels", "9999"], ["--bootstrap", "0"],
     ["--seed", str(2**64)], ["--bootstrap", "1000000000"], ["--labels", "5²"],
     ["--data", "nowhere"], ["--predict", "nowhere.csv"], ["run"]],
)  # fmt: skip
def test_wrong_arguments_are_refused(cohort, tmp_path, monkeypatch, arguments):
    run = make_run(tmp_path / "run", cohort)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), *arguments])
    with pytest.raises(data.InputError):
        evaluate.main()
