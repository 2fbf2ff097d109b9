"""data.py against oracles: files of known content, analytic volumes, signals of known frequency."""

import csv
import itertools
import json
import multiprocessing
import os

import numpy as np
import pytest
import raw_files as raw
import torch

import data

RHYTHM = raw.rhythm()
ED, ES = raw.heart_volumes()
NO_AFFINE = "no affine along a heart, axes stay as stored: look with data.py show"


# ---------------------------------------------------------------- ECG files


ECG_FILES = [  # file, how it is written, its options, rate in Hz, one step in µV
    ("a.xml", raw.write_xml, {}, 500, 5),
    ("a.xml", raw.write_xml, {"rate": 1000, "resolution": 4.88}, 1000, 4.88),
    ("a.hea", raw.write_wfdb, {}, 500, 1),
    ("a.hea", raw.write_wfdb, {"gain": 200, "baseline": -512, "unit": "mv"}, 500, 5),
    ("a.hea", raw.write_wfdb, {"end": "mat", "gain": 0.25, "baseline": 7, "unit": "uV"}, 500, 4),
    ("a.hea", raw.write_wfdb, {"first": "a.mat 12 500 5000 05-May-2020 14:50:55"}, 500, 1),
    ("a.hea", raw.write_wfdb, {"first": "# from a hospital\n\na 12 500/500.0(0) 5000"}, 500, 1),
    ("a.hea", raw.write_shuffled, {}, 500, 1),
    ("a.npy", np.save, {}, 500, 0),
    ("a.npy", np.save, {}, 257, 0),
]


@pytest.mark.parametrize(("file", "write", "options", "rate", "step_uv"), ECG_FILES)
def test_every_reader_gives_the_ecg_that_was_written(file, write, options, rate, step_uv, tmp_path):
    write(tmp_path / file, raw.rhythm(rate=rate), **options)
    ecg_hz = "" if rate == 500 else str(rate)
    read, warnings = data.read_ecg({"ecg": file, "ecg_hz": ecg_hz}, tmp_path)
    expected, _ = data.clean_ecg(raw.rhythm(rate=rate), rate)
    assert read.dtype == np.int16 and read.shape == (12, 2500) and warnings == []
    assert np.abs(read.astype(int) - expected).max() <= step_uv + 1


@pytest.mark.parametrize(
    ("mains_hz", "hertz", "low", "high"),
    [(50, 0.1, 0, 0.05), (50, 1, 0.9, 1), (50, 40, 0.9, 1.03), (50, 50, 0, 0.1)]
    + [(60, 60, 0, 0.1), (60, 50, 0.9, 1.03), (0, 50, 0.97, 1.03), (50, 200, 0, 0.05)],  # no alias
)
def test_which_frequencies_cleaning_keeps(mains_hz, hertz, low, high):
    wave = np.sin(2 * np.pi * hertz * np.arange(5000) / 500)
    added_mv = raw.twelve_leads(0.2 * wave, 0.3 * wave, 0.4 * np.tile(wave, (6, 1)))
    without, _ = data.clean_ecg(RHYTHM, 500, mains_hz)
    with_wave, _ = data.clean_ecg(RHYTHM + added_mv, 500, mains_hz)
    left_uv = (with_wave.astype(float) - without)[:, 375:-375]  # the ends may ring
    gain = left_uv.std(axis=1) / (1000 * added_mv.std(axis=1))
    assert (low <= gain).all() and (gain <= high).all(), gain


@pytest.mark.parametrize(("rate", "seconds"), [(257, 10), (500, 10), (1000, 10), (500, 21)])
def test_the_middle_10_s_are_kept_in_time_and_voltage(rate, seconds):
    stored_mv = raw.rhythm(seconds, rate, bpm=40)[:, :-1]  # the last sample may lack
    cleaned, _ = data.clean_ecg(stored_mv, rate)
    start = (seconds - 10) * 125
    expected, _ = data.clean_ecg(raw.rhythm(seconds, 250, bpm=40)[:, start : start + 2500], 250)
    assert np.abs(cleaned.astype(int) - expected)[:, 250:-250].max() < 20  # µV
    np.testing.assert_allclose(np.ptp(cleaned, axis=1) / 1000, np.ptp(stored_mv, axis=1), rtol=0.06)


def test_any_exchange_of_two_limb_leads_is_refused():
    for one, other in itertools.combinations(range(6), 2):
        exchanged = raw.changed(RHYTHM, [one, other], RHYTHM[[other, one]])
        with pytest.raises(data.InputError, match="Einthoven"):
            data.clean_ecg(exchanged, 500)


SINE = np.sin(2 * np.pi * 7.3 * np.arange(5000) / 500)
VOLUMES = {"LVEDV_ml": "140", "LVESV_ml": "56", "LVEF_pct": "60", "RVEDV_ml": "150"}
CLEAN = data.clean_ecg
CROP = data.crop_heart
CHECK = data.implausible_values
WARNED = {  # what reads it, its arguments, words of a warning
    "good ECG": (CLEAN, (RHYTHM, 500), None),
    "lead dead for 1 s": (CLEAN, (raw.changed(RHYTHM, np.s_[7, 900:1400], 0), 500), None),
    "for 3 s": (CLEAN, (raw.changed(RHYTHM, np.s_[7, 900:2400], 0), 500), "loose electrode: V2"),
    "all for 5 s": (CLEAN, (raw.changed(RHYTHM, np.s_[:, :2500], 0), 500), "electrode: I II III"),
    "sine": (CLEAN, (raw.twelve_leads(SINE, 1.2 * SINE, np.tile(SINE, (6, 1))), 500), "one sine"),
    "loose arm": (CLEAN, (raw.changed(RHYTHM, 0, RHYTHM[0] + 0.015 * SINE), 500), "only roughly"),
    "good heart": (CROP, (raw.scan_of(ED, ES),), None),
    "phases exchanged": (CROP, (raw.scan_of(ES, ED),), "ES seems to hold more blood than ED"),
    "12 slices": (CROP, (raw.scan_of(*raw.heart_volumes((12, 44, 48))),), None),
    "too tall": (CROP, (raw.scan_of(*raw.heart_volumes((13, 44, 48))),), "taller than the box"),
    "too wide": (CROP, (raw.scan_of(ED, ES, (10, 4, 4), ED > 0),), "touches the border"),
    "good row": (CHECK, ({"ecg": "a", "age": "64", **VOLUMES},), None),
    "other percents": (CHECK, ({"disease_stage": "3", "GLS_pct": "-19"},), None),
    "negative": (CHECK, ({"LVSV_ml": "-3"},), "LVSV_ml is implausible"),
    "90 kg": (CHECK, ({"LVM_g": "90000"},), "LVM_g is implausible"),
    "an EF of 1": (CHECK, ({"LVEF_pct": "0.6"},), "LVEF_pct is implausible"),
    "other EF": (CHECK, ({**VOLUMES, "LVEF_pct": "70"},), "LVEF_pct is not 100 (LVEDV_ml - LVESV"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_rare_is_kept_with_a_warning(name):
    read, arguments, words = WARNED[name]
    result = read(*arguments)
    warnings = result if read is CHECK else result[1]
    assert bool(warnings) == bool(words) and (words or "") in " ".join(warnings)


# ---------------------------------------------------------------- CMR files


PAIR = {"ed": "ed.nii", "es": "es.nii"}
AXES = itertools.permutations(range(3))
SIGNS = itertools.product((1, -1), repeat=3)
TURNS = [np.column_stack(turn) for turn in itertools.product(AXES, SIGNS)]  # all 48


@pytest.mark.parametrize("k", range(48))
def test_any_storage_order_gives_one_array(k, tmp_path):
    raw.write_nifti(tmp_path / "ed.nii", ED, turn=TURNS[k], endian="<>"[k % 2])
    raw.write_nifti(tmp_path / "es.nii", ES, turn=TURNS[(7 * k + 5) % 48], version=1 + k % 2)
    raw.write_nifti(tmp_path / "mask.nii", (ED > 200).astype(np.int16), turn=TURNS[k - 11])
    scan = data.read_scan({**PAIR, "mask": "mask.nii"}, tmp_path)
    assert np.array_equal(scan.phases["ed"], ED) and np.array_equal(scan.phases["es"], ES)
    assert np.array_equal(scan.mask, ED > 200) and scan.warnings == []


# Along the scanner's axes, as SimpleITK writes, apex first, and as ACDC: spacing in zooms alone
SCANNER = [np.diag(steps) for steps in ([3, 3, 10, 1], [-3, -3, 10, 1], [3, 3, -10, 1], [1] * 4)]
ALONG_A_HEART = raw.oblique(tilt_degrees=15)


@pytest.mark.parametrize("affine", [ALONG_A_HEART, raw.oblique(tilt_degrees=40), *SCANNER])
def test_only_an_affine_along_a_heart_turns_the_stack(affine, tmp_path):
    is_trusted = affine is ALONG_A_HEART
    flip_slices = [[0, 1], [1, 1], [2, -1]]
    for phase, volume in (("ed", ED), ("es", ES)):
        raw.write_nifti(tmp_path / f"{phase}.nii", volume, affine, (3, 3, 10), flip_slices)
    scan = data.read_scan(PAIR, tmp_path)
    assert np.array_equal(scan.phases["ed"], ED if is_trusted else ED[::-1])  # as stored
    assert scan.warnings == ([] if is_trusted else [NO_AFFINE])
    np.testing.assert_allclose(scan.spacing_mm, (10, 3, 3), rtol=1e-5)


@pytest.mark.parametrize("placed", ["ed", "es"])
def test_a_phase_without_an_affine_lies_in_its_file_as_the_other_does(placed, tmp_path):
    affines = {"ed": np.eye(4), "es": np.eye(4)}
    affines[placed] = raw.oblique((10, 2.5, 3))[:, [1, 0, 2, 3]] @ np.diag([1, -1, 1, 1])
    for phase, volume in (("ed", ED), ("es", ES)):
        raw.write_nifti(tmp_path / f"{phase}.nii", volume, affines[phase], (2.5, 3, 10))
    scan = data.read_scan(PAIR, tmp_path)
    for phase, volume in (("ed", ED), ("es", ES)):
        turned = volume[:, ::-1].swapaxes(1, 2) if placed == "ed" else volume
        np.testing.assert_array_equal(scan.phases[phase], turned)


def test_an_es_that_is_cropped_and_a_mask_that_is_shifted_meet_their_ed(tmp_path):
    ed, es = raw.heart_volumes((10, 80, 90))
    moved = raw.oblique() @ np.array([[1, 0, 0, 25], [0, 1, 0, 20], [0, 0, 1, 1], [0, 0, 0, 1]])
    shifted = raw.oblique() @ np.array([[1, 0, 0, 0.3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    raw.write_nifti(tmp_path / "ed.nii", ed)
    raw.write_nifti(tmp_path / "es.nii", es[1:, 20:-20, 25:-25], moved)
    raw.write_nifti(tmp_path / "mask.nii", (ed > 200).astype(np.int16), shifted)
    scan = data.read_scan({**PAIR, "mask": "mask.nii"}, tmp_path)
    difference = np.abs(scan.phases["es"] - es)
    assert difference[2:, 21:-21, 26:-26].max() < 0.1 and scan.phases["es"][0].max() < 0.1
    assert np.array_equal(scan.mask, ed > 200)  # nearest neighbour: labels are not averaged


@pytest.mark.parametrize(("cells", "ed", "es"), [(("", ""), 0, 4), (("1.0", "6"), 1, 6)])
def test_frames_of_a_cine_are_taken_or_estimated(cells, ed, es, tmp_path):
    cine = raw.beating_heart([0, 0.3, 0.6, 0.85, 1, 0.8, 0.5, 0.3, 0.2, 0.1])
    raw.write_nifti(tmp_path / "cine.nii", cine)
    row = {"cine": "cine.nii", "ed_frame": cells[0], "es_frame": cells[1]}
    scan = data.read_scan(row, tmp_path)
    assert np.array_equal(scan.phases["ed"], cine[..., ed])
    assert np.array_equal(scan.phases["es"], cine[..., es])
    assert scan.warnings == ([] if cells[1] else ["ES frame was estimated from the images"])


@pytest.mark.parametrize("spacing_mm", [(10, 1.4, 1.4), (8, 1.8, 1.8), (5, 1.3, 1.3), (12, 2.5, 2)])
def test_one_box_and_one_window_keep_volume_contraction_and_motion(spacing_mm):
    shape = [round(110 / mm) for mm in spacing_mm]
    ed = 500 * raw.ellipsoid(shape, spacing_mm, (42, 26, 24))
    es = 300 * raw.ellipsoid(shape, spacing_mm, (36, 19, 18))
    arrays, _ = data.crop_heart(raw.scan_of(ed, np.roll(es, 4, axis=2), spacing_mm))
    sums = {name: array.sum(dtype=float) for name, array in arrays.items()}
    for phase, radii_mm, grey in (("ed", (42, 26, 24), 1), ("es", (36, 19, 18), 0.6)):
        volume_mm3 = sums[phase] / 255 / grey * np.prod(data.SPACING_MM)
        assert volume_mm3 == pytest.approx(4 / 3 * np.pi * np.prod(radii_mm), rel=0.02)
    places = {name: (arrays[name] * np.arange(64)).sum() / sums[name] for name in arrays}
    assert 3 * (places["es"] - places["ed"]) == pytest.approx(4 * spacing_mm[2], abs=0.3)


def test_resampling_is_exact_on_the_grids_own_spacing_and_averages_finer_pixels():
    volume = np.random.default_rng(0).random((12, 72, 72)).astype(np.float32)
    cropped = data.resample(volume, np.array([0, 6, 2]), np.ones(3))
    np.testing.assert_array_equal(cropped, volume[:, 6:70, 2:66])
    chessboard = np.indices((12, 128, 128))[1:].sum(axis=0) % 2.0
    averaged = data.resample(chessboard.astype(np.float32), np.zeros(3), np.array([1, 2, 2]))
    assert np.abs(averaged[:, 4:-4, 4:-4] - 0.5).max() < 0.2


def test_the_grey_window_sees_no_sample_beyond_the_stack():
    part = data.covered_part((12, 64, 64), np.array([-1.0, 0, 3]), np.array([1.25, 1, 1.5]))
    assert part == (slice(1, 10), slice(0, 64), slice(0, 41))  # last ones at 10.25, 63 and 63


def blood(*arguments):
    """Where the brightest voxels of ED lie in the crop of a scan."""
    return data.crop_heart(raw.scan_of(*arguments))[0]["ed"] > 240


def test_the_box_follows_what_moves_and_a_mask_goes_before():
    ed, es = raw.heart_volumes((12, 76, 80))
    centred = blood(ed, es)
    assert np.array_equal(blood(np.roll(ed, 6, axis=2), np.roll(es, 6, axis=2)), centred)
    masked = blood(ed, es, (10, 3, 3), np.roll(ed > 200, 6, axis=2))
    assert np.array_equal(np.roll(masked, 6, axis=2), centred)


def test_the_box_ignores_empty_slices_and_what_one_phase_lacks():
    ed, es = raw.heart_volumes((8, 64, 64))
    centred = blood(ed, es)
    empty = ((12, 1), (0, 0), (0, 0))
    assert np.array_equal(blood(np.pad(ed, empty), np.pad(es, empty)), centred)
    ed[-2:, 10:30, 8:20] = 900  # bright, far from the heart
    es[-2:] = 0
    assert np.array_equal(blood(ed, es)[:8], centred[:8])


# ---------------------------------------------------------------- manifest and cohort folder


def test_splits_are_a_function_of_the_id_alone():
    splits = [data.split_of(f"{k:05d}") for k in range(4000)]
    shares = [splits.count(split) / 4000 for split in data.SPLITS]
    np.testing.assert_allclose(shares, (0.70, 0.15, 0.15), atol=0.02)
    known = {"1000001": "train", "1000008": "val", "1000016": "test"}  # never to change
    assert {subject: data.split_of(subject) for subject in known} == known


def test_a_manifest_as_excel_writes_it_and_its_numeric_columns(tmp_path, capsys):
    header = "\ufeffid;ecg;ed;es;age;LVEF_pct;LVM_g;note;;\n"
    cells = ["61;60;nan;mild", ";high;;7", "64.0;58.5;nan;mild", ";;;", "59;nan;;severe"]
    lines = [f"00{k};a,1.xml;d;s;{text};;\n" for k, text in enumerate(cells)]
    (tmp_path / "m.csv").write_text(header + "".join(lines))
    rows, columns = data.read_manifest(tmp_path / "m.csv")
    assert columns == ["age", "LVEF_pct"]
    printed = capsys.readouterr().out
    assert "column note is ignored: it holds no numbers but in lines [3]\n" in printed
    assert "column LVM_g is ignored" in printed and "column (unnamed) is ignored" in printed
    first = [rows[0].cells[name] for name in ("id", "ecg", "split")]
    assert first == ["000", "a,1.xml", data.split_of("000")]
    problems = [row.problem for row in rows]
    assert problems.count("") == 4 and "line 3: LVEF_pct 'high' is no number" in problems[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Five rows and the cohort that is prepared from them: (manifest, folder)."""
    folder = tmp_path_factory.mktemp("prepared")
    first = {**raw.write_subject(folder, "a", 0), "split": "train"}
    second = {**raw.write_subject(folder, "b", 1), "split": "test"}
    raw.write_as_acdc(folder / "as_acdc.nii", raw.heart_volumes(seed=2)[0])
    rows = [
        {**first, "LVEF_pct": "60", "LVEDV_ml": "100", "LVESV_ml": "40", "outcome": "0"},
        {**second, "LVEF_pct": "60", "LVEDV_ml": "100", "LVESV_ml": "70", "outcome": "1"},
        {**first, "id": "same", "ed": second["ed"], "LVEDV_ml": "-5"},
        {**second, "id": "gone", "ecg": "nowhere.hea"},
        {**first, "id": "acdc", "ed": "as_acdc.nii", "split": "val"},
    ]
    manifest = raw.write_manifest(folder, rows)
    data.prepare(manifest, folder / "cohort", workers=1)
    return manifest, folder / "cohort"


def test_a_cohort_folder_holds_what_the_contract_says(prepared):
    manifest, folder = prepared
    names = "cohort.json ecg.npy ed.npy es.npy rejected.csv subjects.csv warnings.csv"
    assert sorted(os.listdir(folder)) == names.split()
    about = json.loads((folder / "cohort.json").read_text())
    assert about["grid"] == [12, 64, 64] and about["spacing_mm"] == [10, 3, 3]
    assert about["source"] == {"kind": "manifest", "manifest": str(manifest), "mains_hz": 50}
    cohort = data.open_cohort(folder)
    assert cohort.ids.tolist() == ["a", "b", "same", "acdc"]
    assert cohort.split.tolist() == ["train", "test", "train", "val"]
    assert cohort.phenotypes == ["LVEF_pct", "LVEDV_ml", "LVESV_ml"]
    assert cohort.outcomes == ["outcome"] and cohort.covariates == []
    np.testing.assert_array_equal(cohort.columns["LVEDV_ml"], [100, 100, -5, np.nan])
    row = {"ecg": "b.hea", "ed": "b_ed.nii.gz", "es": "b_es.nii.gz"}
    arrays, _ = data.crop_heart(data.read_scan(row, manifest.parent))
    arrays["ecg"], _ = data.read_ecg(row, manifest.parent)
    for name, (dtype, shape) in data.ARRAYS.items():
        stored = np.load(folder / f"{name}.npy")
        assert stored.dtype.str == dtype and stored.shape == (4, *shape)
        np.testing.assert_array_equal(stored[1], arrays[name])


def test_rejected_and_warned_rows_are_listed_with_ids_and_reasons(prepared, capsys):
    manifest, folder = prepared
    with open(folder / "rejected.csv") as rejected, open(folder / "warnings.csv") as warnings:
        tables = [[tuple(row) for row in csv.reader(file)] for file in (rejected, warnings)]
    missing = manifest.parent / "nowhere.hea"
    assert tables[0] == [("id", "reason"), ("gone", f"{missing}: does not exist; correct the path")]
    assert tables[1] == [
        ("id", "warning"),
        ("b", "LVEF_pct is not 100 (LVEDV_ml - LVESV_ml) / LVEDV_ml"),
        ("same", "LVEDV_ml is implausible (outside 5 to 800)"),
        ("same", "same ecg array as in row: a"),
        ("same", "LEAK between splits, same ed array as in row: b"),
        ("acdc", NO_AFFINE),
        ("acdc", "LEAK between splits, same ecg array as in row: a"),
    ]
    five = [{"id": f"s{k}", "warning": "flat for 2 s: V1"} for k in range(5)]
    data.Report(warnings=five).print("c")
    assert "flat for 2 s (5 subjects: s0, s1, s2, …)" in capsys.readouterr().out


def test_the_fingerprint_changes_with_the_arrays_alone(tmp_path):
    fingerprints = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(fingerprints))
        data.write_cohort(folder, raw.random_subjects(3, seed), ["x"], {"kind": "test"})
        fingerprints.append(data.open_cohort(folder).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_manifest_is_prepared_once_and_anew_when_it_changes(prepared, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = data.find_cohort(prepared[0])
    made = (first.folder / "ecg.npy").stat().st_mtime_ns
    assert first.folder.name.startswith("manifest-") and len(first.ids) == 4
    assert (data.find_cohort(prepared[0]).folder / "ecg.npy").stat().st_mtime_ns == made
    changed = prepared[0].with_name("changed.csv")
    changed.write_text(prepared[0].read_text().replace("60", "61"))
    assert data.find_cohort(changed).fingerprint != first.fingerprint
    samples = next(prepared[0].parent.glob("*.dat"))
    os.utime(samples, (1, 1))  # the samples behind a header are new
    assert data.find_cohort(prepared[0]).folder != first.folder


def test_one_impossible_file_name_does_not_stop_a_manifest(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    row = raw.write_subject(tmp_path)
    names = ["/", "\0", "x" * 5000, ".."]
    bad = [{**row, "id": f"bad{k}", "ecg": name} for k, name in enumerate(names)]
    raw.write_manifest(tmp_path, [{**row, "id": "good"}, *bad])
    assert list(data.find_cohort(tmp_path / "manifest.csv").ids) == ["good"]


def test_no_more_processes_than_rows_or_cores():
    for _ in data.run_parallel(abs, range(3), workers=200):
        processes = len(multiprocessing.active_children())
        assert 1 <= processes <= min(3, os.cpu_count())


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "c"
    data.write_cohort(folder, raw.random_subjects(20), ["x"], {"kind": "test"})
    return data.open_cohort(folder)


def test_batches_are_millivolt_and_zero_to_one(cohort):
    arrays = {name: np.load(cohort.folder / f"{name}.npy") for name in data.ARRAYS}
    indices = np.array([5, 2, 9])
    stored = data.CohortDataset(cohort)[3, indices]
    assert stored["epoch"] == 3 and stored["indices"].tolist() == [5, 2, 9]
    batch = data.to_batch(stored)
    assert set(batch) == {"ecg", "ed", "es"} and batch["ed"].shape == (3, 1, *data.GRID)
    np.testing.assert_allclose(batch["ecg"], arrays["ecg"][indices] / 1000, atol=1e-6)
    for phase in data.PHASES:
        np.testing.assert_allclose(batch[phase][:, 0], arrays[phase][indices] / 255, atol=1e-6)
    partners = np.arange(20)[::-1]
    crossed = data.CohortDataset(cohort, ("ecg", "ed"), partners)[0, indices]
    np.testing.assert_array_equal(crossed["ecg"], arrays["ecg"][[14, 17, 10]])
    np.testing.assert_array_equal(crossed["ed"], arrays["ed"][indices])


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_batches_are_in_order_and_not_augmented(workers, cohort):
    indices = np.arange(19, 2, -1)
    dataset = data.CohortDataset(cohort, ("ecg",))
    batches = [b["ecg"] for b in data.plain_batches(dataset, indices, size=7, workers=workers)]
    assert max(map(len, batches)) <= 7
    ecg_mv = np.load(cohort.folder / "ecg.npy")[indices] / 1000
    np.testing.assert_allclose(torch.cat(batches), ecg_mv, atol=1e-6)


def test_epochs_are_whole_batches_in_an_order_of_seed_and_epoch():
    indices = np.arange(100, 143)
    batches = np.array(data.epoch_batches(indices, 8, 0, 0))
    assert batches.shape == (5, 8) and len(set(batches.flat) & set(indices)) == 40
    assert np.array_equal(batches, data.epoch_batches(indices, 8, 0, 0))
    for other in ((0, 1), (1, 0)):
        assert not np.array_equal(batches, data.epoch_batches(indices, 8, *other))


def augmented(cohort, indices, seed=0, epoch=0):
    return data.to_batch(data.CohortDataset(cohort)[epoch, np.array(indices)], seed=seed)


@pytest.mark.parametrize("epoch", range(6))  # in some of them no subject is moved
def test_augmentation_depends_on_seed_epoch_and_subject_only(epoch, cohort):
    batch = augmented(cohort, [3, 5, 7], epoch=epoch)
    beside_another = augmented(cohort, [7, 1], epoch=epoch)
    for name in data.ARRAYS:
        subject = batch[name][2]
        assert torch.equal(subject, beside_another[name][0])
        assert not torch.equal(subject, augmented(cohort, [7], epoch=epoch + 1)[name][0])
        assert not torch.equal(subject, augmented(cohort, [7], seed=1, epoch=epoch)[name][0])


def test_augmentation_is_that_of_a_repeated_examination():
    """Phases move alike, are never mirrored and keep their size; ECGs keep about their voltage."""
    image = torch.zeros(64, *data.GRID, dtype=torch.uint8)
    image[..., 24:40, 8:18] = 255  # the right ventricle, on the left of the image
    ecg = torch.from_numpy(1000 * SINE[::2]).expand(64, 12, 2500)  # 1 mV
    stored = {"ecg": ecg, "ed": image, "es": image, "indices": range(64)}
    for epoch in range(4):
        batch = data.to_batch({**stored, "epoch": epoch}, seed=0)
        ed, es = [(batch[phase][:, 0] > 0.5).float() for phase in data.PHASES]
        assert (ed - es).abs().mean() < 1e-3
        area = ed.sum((1, 2, 3)) / 12
        columns = (ed * torch.arange(64)).sum((1, 2, 3)) / (12 * area)
        assert columns.max() < 26 and (area - 160).abs().max() < 16  # the middle is 31.5
        changed = (ed - (image > 127).float()).abs().mean((1, 2, 3))
        assert 0.02 < (changed > 0.002).float().mean() < 0.35  # one subject of seven moves
        assert -0.3 < batch["ed"].min() and batch["ed"].max() < 1.5
        gain = batch["ecg"].std(dim=2) / SINE.std()
        is_on = gain > 0.1
        assert 0.9 < is_on.float().mean() < 0.995  # a lead is lost now and then
        assert 0.85 < gain[is_on].min() and gain.max() < 1.15 and gain.std() > 0.02


def test_show_draws_a_subject(cohort_folder, tmp_path):
    data.show(cohort_folder, "000003", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
