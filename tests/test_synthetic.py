"""synthetic.py: hearts, what ECG and CMR show of them, and the files they are written to."""

from functools import partial

import numpy as np
import pytest
import scipy.io
import torch

import data
import evaluate
import synthetic

PETERSEN = {  # mean and standard deviation of women, men; J Cardiovasc Magn Reson 2017, 19:18
    "LVEDV_ml": (124, 21, 166, 32),
    "LVEF_pct": (61, 5, 58, 5),
    "LVM_g": (70, 13, 103, 21),
    "RVEDV_ml": (130, 24, 182, 36),
    "RVEF_pct": (58, 6, 54, 6),
}
VOXEL_ML = np.prod(synthetic.STACK_MM) / 1000


def generator(*seeds):
    return np.random.default_rng(seeds)


def draw_placed(subject):
    """A heart of seed 0 and its place in the stack, as simulate_cmr draws it."""
    heart = synthetic.draw_heart(0, subject)
    return heart, synthetic.place_heart(heart, generator(0, subject, 1))


def test_hearts_and_ecgs_are_the_first_editions():
    """Its numbers, among them samples of a QRS complex, so that results compare across editions."""
    heart = synthetic.draw_heart(0, 0)
    stated = {"LVEDV_ml": 107.3432, "LVEF_pct": 58.1329, "LVM_g": 64.5448, "RVEF_pct": 44.0481}
    assert {name: heart[name] for name in stated} == pytest.approx(stated, abs=1e-4)
    ecg_uv = 1000 * synthetic.simulate_ecg(heart, generator(0, 0, 2))
    first_edition_uv = [[395, 310, 240, 175, 85], [-465, -425, -405, -365, -370]]  # II, V1
    np.testing.assert_allclose(ecg_uv[[1, 6], 1000:1005], first_edition_uv, atol=5.01)


def test_hearts_have_the_published_means_and_spreads():
    hearts = [synthetic.draw_heart(1, subject) for subject in range(2000)]
    for sex in (0, 1):
        for name, stated in PETERSEN.items():
            mean, spread = stated[2 * sex : 2 * sex + 2]
            values = np.array([heart[name] for heart in hearts if heart["sex"] == sex])
            assert values.mean() == pytest.approx(mean, rel=0.15), (name, sex)
            assert 0.85 * spread < values.std() < 2 * spread, (name, sex)  # some are ill
    stated = {"sex": 0.48, "heart_failure": 0.06, "atrial_fibrillation": 0.09, "hypertension": 0.3}
    shares = {name: np.mean([heart[name] for heart in hearts]) for name in stated}
    assert shares == pytest.approx(stated, abs=0.03)


def test_a_subject_depends_on_seed_and_number_alone():
    first, again = [synthetic.simulate_subject(3, 7) for _ in range(2)]
    others = [synthetic.simulate_subject(4, 7), synthetic.simulate_subject(3, 8)]
    assert first.cells == again.cells
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        for other in others:
            assert (other.arrays[name] != array).mean() > 0.5, name


def test_limb_leads_obey_einthoven_and_goldberger():
    ecg_mv = synthetic.simulate_ecg(synthetic.draw_heart(0, 0), generator(5))
    lead_i, lead_ii, lead_iii, avr, avl, avf = ecg_mv[:6]
    assert ecg_mv.shape == (12, 5000) and np.ptp(lead_ii) > 0.3
    np.testing.assert_allclose(lead_i + lead_iii, lead_ii, atol=0.0101)  # each rounded to 5 uV
    np.testing.assert_allclose(avr + avl + avf, 0, atol=0.0101)


MOVES = [  # cause, its change, what rises, what falls
    ("LVEF_pct", -20, "qrs_ms qt_ms q_back r_back t_axis_deg", "qrs_axis_deg t_mv"),
    ("LVM_g", 30, "qrs_mv t_axis_deg", "qrs_axis_deg t_mv"),
    ("LVEDV_ml", 60, "qrs_ms", ""),
    ("RVEDV_ml", 60, "s_right", ""),
    ("RVEF_pct", -15, "s_right", ""),
    ("age", 10, "pr_ms", "qrs_axis_deg"),
    ("bmi", 6, "", "qrs_axis_deg qrs_mv t_mv p_mv"),
    ("sex", 1, "qrs_ms qrs_axis_deg t_mv", "qt_ms t_axis_deg"),
    ("turn_deg", 15, "qrs_axis_deg", ""),
    ("tilt", 0.1, "r_back", ""),
]


@pytest.mark.parametrize("cause, step, rises, falls", MOVES)
def test_each_cause_moves_its_wave_properties_and_no_other(cause, step, rises, falls):
    heart = synthetic.draw_heart(0, 0)
    before = vars(synthetic.wave_properties(heart, generator(5)))
    heart[cause] += step
    after = vars(synthetic.wave_properties(heart, generator(5)))
    assert {name for name in before if after[name] > before[name] + 1e-9} == set(rises.split())
    assert {name for name in before if after[name] < before[name] - 1e-9} == set(falls.split())


def test_depth_weakens_the_chest_leads_alone():
    heart = synthetic.draw_heart(0, 0)
    near = synthetic.simulate_ecg(heart, generator(5))
    far = synthetic.simulate_ecg({**heart, "depth_mm": heart["depth_mm"] + 20}, generator(5))
    np.testing.assert_array_equal(far[:6], near[:6])
    ratio = np.ptp(far[8:], axis=1) / np.ptp(near[8:], axis=1)  # V3 to V6
    assert ratio == pytest.approx(np.full(4, np.exp(-0.4)), abs=0.1)


def test_phantom_holds_the_volumes_of_the_heart():
    for subject in range(60):
        heart, place = draw_placed(subject)
        for phase, contraction in synthetic.CONTRACTION.items():
            tissues = synthetic.tissue_fractions(heart, contraction, place)
            end = f"{phase.upper()}V_ml"
            stated = [heart[f"LV{end}"], heart[f"RV{end}"], heart["LVM_g"] / 1.05]
            volumes = [tissues[name].sum() * VOXEL_ML for name in ("lv", "rv", "wall")]
            assert volumes == pytest.approx(stated, rel=0.02), (subject, phase)
            fractions = np.stack([*tissues.values(), 1 - sum(tissues.values())])
            assert fractions.min() > -1e-5 and fractions.max() < 1 + 1e-5


def test_heart_tapers_to_the_apex_and_its_base_descends():
    for subject in range(10):
        heart, place = draw_placed(subject)
        ed, es = [synthetic.tissue_fractions(heart, contraction, place) for contraction in (0, 1)]
        for name in ("lv", "rv"):
            areas = ed[name].sum(axis=(1, 2))  # (Z,)
            assert areas.argmax() <= np.flatnonzero(areas)[0] + 1  # the base may cut its slice
            assert (np.diff(areas[areas.argmax() :]) <= 0).all() and areas[-1] == 0
            assert np.abs(np.diff(areas)).max() < 0.25 * areas.sum()  # no slice is left out
            assert es[name].sum() < ed[name].sum()
        base = [np.flatnonzero(tissues["lv"].sum(axis=(1, 2)) > 1)[0] for tissues in (ed, es)]
        assert base[1] > base[0]
        x_mm = [(synthetic.X_MM * ed[name]).sum() / ed[name].sum() for name in ("rv", "lv")]
        assert x_mm[0] < x_mm[1] - 10  # the RV is on the left


def test_picture_has_the_contrast_of_a_short_axis_stack():
    heart, place = draw_placed(2)
    scan = synthetic.simulate_cmr(heart, generator(0, 2, 1))
    tissues = synthetic.tissue_fractions(heart, 0, place)
    grey = {name: scan.phases["ed"][fraction > 0.95].mean() for name, fraction in tissues.items()}
    assert min(grey["lv"], grey["rv"]) > 2.5 * grey["wall"] and grey["fat"] > 1.2 * grey["wall"]
    heart_ml = VOXEL_ML * sum(tissues[name].sum() for name in ("lv", "wall", "rv"))
    assert scan.mask.sum() * VOXEL_ML == pytest.approx(heart_ml, rel=0.1)
    blood = [(scan.phases[phase] > 0.6 * grey["lv"])[scan.mask].sum() for phase in ("ed", "es")]
    assert blood[1] < 0.75 * blood[0]


def test_raw_files_are_read_back_as_the_cohort(tmp_path):
    raw, read, made = [tmp_path / name for name in ("raw", "read", "made")]
    synthetic.write_raw(raw, 6, seed=2)
    assert {path.suffix for path in raw.iterdir()} >= {".xml", ".hea", ".dat", ".mat", ".npy"}
    data.prepare(raw / "manifest.csv", read, workers=1)
    synthetic.make_cohort(made, 6, seed=2, workers=1)
    for name in ("subjects.csv", "warnings.csv"):
        assert (read / name).read_text() == (made / name).read_text()
    for name, largest_difference in (("ecg", 5), ("ed", 1), ("es", 1)):
        difference = np.load(read / f"{name}.npy") - np.load(made / f"{name}.npy").astype(int)
        assert np.abs(difference).max() <= largest_difference, name
    assert (raw / "000002_cine.nii.gz").exists() and not (raw / "000002_ed.nii.gz").exists()


def test_wfdb_records_carry_first_values_and_checksums(tmp_path):
    demo = tmp_path / "demo"
    synthetic.write_raw(demo, 3)
    from_dat = np.fromfile(demo / "000001.dat", "<i2").reshape(5000, 12).T
    from_mat = scipy.io.loadmat(demo / "000002.mat")["val"]
    for name, samples in (("000001", from_dat), ("000002", from_mat)):
        _, *lines = (demo / f"{name}.hea").read_text().splitlines()
        for lead, line, values in zip(data.LEADS, lines, samples.tolist(), strict=True):
            first, checksum, _, label = line.split()[-4:]
            assert (label, int(first)) == (lead, values[0])
            assert int(checksum) == (sum(values) + 2**15) % 2**16 - 2**15


def test_default_cohort_is_made_once(tmp_path, monkeypatch):
    make = synthetic.make_cohort
    monkeypatch.setattr(synthetic, "make_cohort", lambda folder, **_: make(folder, 2, workers=1))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # made, then opened: made again, it would be refused
        assert len(synthetic.default_cohort().ids) == 2
    assert (tmp_path / "cohorts" / "synthetic-3000-0").is_dir()


REFUSED = [  # arguments, what the sentence must name
    ("new --subjects 0", "--subjects"),
    ("new --seed -1", "--seed"),
    ("new --workers 0", "--workers"),
    ("used --subjects 1 --workers 1", "used"),
    ("used --raw --subjects 1", "used"),
    ("used/file --raw --subjects 1", "file"),
]


@pytest.mark.parametrize("arguments, named", REFUSED)
def test_command_refuses_wrong_arguments(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    monkeypatch.setattr("sys.argv", ["synthetic.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit_:
        data.run_command(synthetic.main)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and named in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "file"]


@pytest.mark.slow
def test_the_ecg_tells_no_more_than_published(tmp_path):
    """Supervised training on 21,000 ECGs: LVM r 0.79 ± 0.05 (Khurshid 2021), LVEF, RVEF harder."""
    hearts = [synthetic.draw_heart(0, subject) for subject in range(30_000)]
    ids = np.array([f"{subject:06d}" for subject in range(len(hearts))])
    columns = {name: np.array([heart[name] for heart in hearts]) for name in synthetic.PHENOTYPES}
    split = np.array([data.split_of(one) for one in ids])
    source = {"kind": "synthetic"}
    names = list(columns)
    cohort = data.Cohort(tmp_path, ids, split, columns, names, [], [], source, "")
    task = partial(clean_simulated_ecg, 0)
    ecgs = list(data.run_parallel(task, range(len(hearts)), label="simulating"))
    np.save(tmp_path / "ecg.npy", np.stack(ecgs))
    indices = {name: cohort.indices(name) for name in data.SPLITS}
    outputs = evaluate.train_supervised(cohort, indices, seed=0, device=torch.device("cpu"))
    x = evaluate.standardise(outputs, outputs[indices["train"]])
    once = np.ones((1, len(indices["test"])))
    metrics = evaluate.probe(x, cohort, indices, names, once).metrics
    print({name: (entry["r2"], entry["pearson"]) for name, entry in metrics.items()})
    assert abs(metrics["LVM_g"]["pearson"] - 0.79) < 0.05
    assert 0.45 < metrics["LVEF_pct"]["r2"] < 0.75
    assert metrics["RVEF_pct"]["r2"] < metrics["LVEF_pct"]["r2"] - 0.1


def clean_simulated_ecg(seed, subject):
    heart = synthetic.draw_heart(seed, subject)
    ecg_mv = synthetic.simulate_ecg(heart, np.random.default_rng([seed, subject, 2]))
    return data.clean_ecg(ecg_mv, synthetic.RECORDER_HZ)[0]
