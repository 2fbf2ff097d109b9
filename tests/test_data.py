"""data.py against oracles: known files, analytic volumes, published statistics, real files."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from raw_files import heart_volumes, rhythm, write_nifti, write_wfdb, xml_text
from scipy.signal import find_peaks

import data

REAL = Path(os.environ["REAL_DATA"]) if os.environ.get("REAL_DATA") else None
real = pytest.mark.skipif(REAL is None, reason="REAL_DATA does not name the folder of real files")
T = np.arange(5000) / 500  # 10 s at 500 Hz


def beats_per_minute(ecg_uv):
    """Heart rate of a cleaned ECG (12, 2500) from the R peaks of all leads together."""
    slope = np.abs(np.diff(ecg_uv.astype(float), axis=1)).sum(axis=0)
    peaks, _ = find_peaks(
        np.convolve(slope, np.ones(20), "same"), distance=75, prominence=slope.max() * 3
    )
    return 60 * 250 / np.median(np.diff(peaks))


# ---------------------------------------------------------------- ECG files


def test_cardiosoft_strip_is_read_and_median_beats_are_not(tmp_path):
    samples = np.arange(12)[:, None] * 100 + np.arange(-30, 30)[None] * 7
    path = tmp_path / "a.xml"
    path.write_text(xml_text(samples * 4.88 / 1000, rate=1000, resolution=4.88))
    assert "\n\t\t\t" in path.read_text() and "MedianSamples" in path.read_text()
    read = data.read_ecg(path)
    assert read["sampling_rate_hz"] == 1000 and read["ecg_mv"].shape == (12, 60)
    np.testing.assert_allclose(read["ecg_mv"], samples * 4.88e-3, rtol=1e-12)


def test_cardiosoft_with_a_further_lead_that_is_empty(tmp_path):
    text = xml_text(rhythm())
    extra = '<WaveformData lead="V7"></WaveformData>'
    (tmp_path / "a.xml").write_text(text.replace("\t</StripData>", f"{extra}\t</StripData>"))
    assert extra in (tmp_path / "a.xml").read_text()
    assert np.abs(data.read_ecg(tmp_path / "a.xml")["ecg_mv"] - rhythm()).max() < 0.003


@pytest.mark.parametrize("end", ["dat", "mat"])
@pytest.mark.parametrize(
    ("gain", "baseline", "unit"), [(1000, 0, "mV"), (200, -512, "mv"), (0.25, 7, "uV")]
)
def test_wfdb_gain_baseline_unit_offset_and_any_lead_order(tmp_path, end, gain, baseline, unit):
    ecg = rhythm(seconds=13) + 0.1 * np.arange(12)[:, None]
    order = np.random.default_rng(1).permutation(12)
    names = [data.LEADS[k].upper() if k % 2 else data.LEADS[k].lower() for k in order]
    path = write_wfdb(tmp_path / "r.hea", ecg[order], 500, end, gain, baseline, unit, names)
    read = data.read_ecg(path)
    step = 1 / gain if unit.lower() == "mv" else 1e-3 / gain
    assert read["ecg_mv"].shape == (12, 6500) and read["sampling_rate_hz"] == 500
    assert np.abs(read["ecg_mv"] - ecg).max() <= step / 2 + 1e-9


def test_the_three_formats_hold_the_same_ecg(tmp_path):
    ecg = np.round(rhythm() / 0.005) * 0.005
    (tmp_path / "a.xml").write_text(xml_text(ecg))
    write_wfdb(tmp_path / "b.hea", ecg, gain=200)
    write_wfdb(tmp_path / "c.hea", ecg, gain=1000, end="mat")
    cleaned = [data.read_clean_ecg(tmp_path / name)["ecg"] for name in ("a.xml", "b.hea", "c.hea")]
    assert np.ptp(cleaned, axis=0).max() <= 1  # microvolt, where rounding may fall to either side


def test_wfdb_with_more_signals_than_twelve_leads(tmp_path):
    ecg = np.vstack([rhythm(), np.zeros((1, 5000))])
    path = write_wfdb(tmp_path / "r.hea", ecg, leads=(*data.LEADS, "resp"))
    np.testing.assert_allclose(data.read_ecg(path)["ecg_mv"], ecg[:12], atol=6e-4)


@pytest.mark.parametrize(
    "first",
    [
        "r.dat 12 500 5000",
        "r 12 500/500(0) 5000 12:00:00 01/01/2000",
        "r 12 500.0 5000",
        "# x\n\nr 12 500 5000",
    ],
)
def test_wfdb_first_line_in_its_dialects(tmp_path, first):
    path = write_wfdb(tmp_path / "r.hea", rhythm())
    path.write_text(path.read_text().replace("r 12 500 5000", first))
    assert data.read_ecg(path)["ecg_mv"].shape == (12, 5000)


# ---------------------------------------------------------------- cleaning


@pytest.mark.parametrize("rate", [250, 500, 1000])
def test_cleaning_keeps_voltage_and_heart_rate(rate):
    ecg = rhythm(rate=rate, bpm=72)
    cleaned = data.clean_ecg(ecg, rate)["ecg"]
    assert cleaned.shape == (12, 2500) and cleaned.dtype == np.int16
    for lead in range(12):
        assert np.ptp(cleaned[lead]) / 1000 == pytest.approx(np.ptp(ecg[lead]), rel=0.06)
    assert np.ptp(cleaned[1]) == pytest.approx(1e3 * np.ptp(ecg[1]), rel=0.03)
    assert beats_per_minute(cleaned) == pytest.approx(72, abs=0.5)


@pytest.mark.parametrize("mains", [50, 60])
def test_cleaning_removes_wander_offset_and_mains(mains):
    ecg = rhythm()
    # One disturbance for all electrodes would break Einthoven: each lead gets what its place asks.
    wander, hum = 0.5 * np.sin(2 * np.pi * 0.15 * T), 0.2 * np.sin(2 * np.pi * mains * T + 1)
    dirty = (
        ecg + ecg.max(axis=1, keepdims=True) * (wander + hum) + 0.3 * ecg.max(axis=1, keepdims=True)
    )
    dirty[2:6] = data_limb_leads(dirty)
    clean, cleaned = (data.clean_ecg(x, 500, mains)["ecg"][:, 250:-250] for x in (ecg, dirty))
    assert np.abs(clean.astype(int) - cleaned).max() < 60  # of up to 900 microvolt put in
    if mains == 60:  # the filter of the other country leaves the hum
        left = data.clean_ecg(dirty, 500, 50)["ecg"][:, 250:-250]
        assert np.abs(clean.astype(int) - left).max() > 150


def data_limb_leads(ecg):
    one, two = ecg[:2]
    return np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2])


def test_longer_recordings_give_their_middle():
    ecg = rhythm(seconds=20, bpm=60)
    ecg[:, :2000] *= 3  # the first 4 s
    cleaned = data.clean_ecg(ecg, 500)["ecg"]
    assert np.abs(cleaned[1]).max() < 1500


def test_a_lead_that_is_flat_in_the_ten_seconds_that_are_kept_is_refused():
    ecg = rhythm(seconds=30)
    ecg[8, 4000:11000] = 0  # V3, 8 to 22 s
    with pytest.raises(data.InputError, match="lead V3 is flat"):
        data.clean_ecg(ecg, 500)


def test_limb_lead_residual_finds_every_exchange_of_two_limb_leads():
    heart = data.draw_heart(0, 1)
    ecgs = [rhythm(), data.simulate_ecg(heart, np.random.default_rng(0))]
    for ecg in ecgs:
        assert data.clean_ecg(ecg, 500)["warnings"] == []
        for one in range(6):
            for two in range(one):
                order = np.arange(12)
                order[[one, two]] = two, one
                with pytest.raises(data.InputError, match="Einthoven"):
                    data.clean_ecg(ecg[order], 500)


# ---------------------------------------------------------------- CMR files


def oblique(spacing_mm=(10, 3, 3)):
    """Affine of (x, y, z) storage whose axes run as SHORT_AXIS, in the patient's frame."""
    unit = data.SHORT_AXIS / np.linalg.norm(data.SHORT_AXIS, axis=1, keepdims=True)
    affine = np.eye(4)
    affine[:3, :3] = unit[::-1].T * np.array(spacing_mm)[::-1]
    affine[:3, 3] = 3, -20, 50
    return affine


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_any_storage_order_with_its_affine_gives_the_same_array(tmp_path, axes, flips):
    volume = np.random.default_rng(0).integers(0, 999, (10, 20, 24)).astype(np.int16)
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), oblique())
    turn = np.column_stack([np.argsort(axes), np.array(flips)[np.argsort(axes)]])
    stored = image.as_reoriented(turn)
    nibabel.save(stored, tmp_path / "a.nii")
    nifti = data.open_nifti(tmp_path / "a.nii")
    np.testing.assert_array_equal(data.read_voxels(nifti), volume)
    np.testing.assert_allclose(nifti["spacing_mm"], (10, 3, 3), rtol=1e-6)
    reference = oblique()[:, [2, 1, 0, 3]]
    np.testing.assert_allclose(nifti["affine"], reference, atol=1e-3)


def test_an_affine_that_contradicts_the_spacing_keeps_the_stored_order(tmp_path):
    volume = np.random.default_rng(0).integers(0, 999, (10, 20, 24)).astype(np.int16)
    write_nifti(tmp_path / "a.nii.gz", volume, (10, 1.5, 1.4), affine=None)
    nifti = data.open_nifti(tmp_path / "a.nii.gz")
    assert nifti["affine"] is None
    np.testing.assert_array_equal(data.read_voxels(nifti), volume)
    np.testing.assert_allclose(nifti["spacing_mm"], (10, 1.5, 1.4), rtol=1e-6)


def test_scaling_of_the_header_is_applied_and_a_trailing_axis_of_one_is_dropped(tmp_path):
    volume = np.arange(4 * 16 * 16, dtype=np.float32).reshape(4, 16, 16) * 0.5 + 7
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0)[..., None], oblique())
    image.header.set_data_dtype(np.int16)  # nibabel writes slope and intercept
    nibabel.save(image, tmp_path / "a.nii")
    voxels = data.read_voxels(data.open_nifti(tmp_path / "a.nii"))
    assert voxels.dtype == np.float32 and voxels.shape == volume.shape
    assert np.abs(voxels - volume).max() < 0.02


def test_trailing_axes_of_one_and_a_qfac_of_zero_are_read(tmp_path):
    volume = heart_volumes()[0]
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0)[..., None, None], None)
    image.header["pixdim"][:4] = 0, 3, 3, 10
    image.header["qform_code"] = 1
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4) + image.to_bytes()[352:])
    nifti = data.open_nifti(tmp_path / "a.nii")
    assert nifti["affine"] is not None and data.read_voxels(nifti).shape == volume.shape


def test_slices_of_an_isotropic_stack_are_the_last_axis_whatever_the_rounding(tmp_path):
    spacing = (1.39999998, 1.4000001, 1.39999998)
    write_nifti(tmp_path / "a.nii", np.ones((30, 48, 52), np.int16), pixdim=spacing)
    assert data.open_nifti(tmp_path / "a.nii")["axes"][0] == 2


def test_a_mask_stored_with_other_axes_than_ed(tmp_path):
    ed, es = heart_volumes()
    for name, volume in (("ed", ed), ("es", es), ("mask", (ed > 200).astype(np.int16))):
        image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), oblique())
        turn = [[2, 1], [0, -1], [1, 1]] if name == "mask" else [[0, 1], [1, 1], [2, 1]]
        nibabel.save(image.as_reoriented(np.array(turn)), tmp_path / f"{name}.nii")
    phases = data.read_phases({n: tmp_path / f"{n}.nii" for n in ("ed", "es", "mask")})
    np.testing.assert_array_equal(phases["mask"], phases["ed"] > 200)


def test_a_slice_that_one_phase_lacks_does_not_move_the_box():
    ed, es = (np.roll(v, 7, axis=2).astype(np.float32) for v in heart_volumes((10, 64, 64)))
    ed[-2:] = 0
    ed[-2:, 10:30, 8:20] = 900  # bright, far from the heart
    whole, spacing = data.motion_box(ed[:8], es[:8], (10, 3, 3)), (10, 3, 3)
    es[-2:] = 0
    assert data.motion_box(ed, es, spacing)[1:] == whole[1:]


def test_phases_on_different_grids_meet_through_their_affines(tmp_path):
    ed, es = heart_volumes()
    write_nifti(tmp_path / "ed.nii", ed, affine=oblique())
    shifted = oblique()
    shifted[:3, 3] += shifted[:3, :3] @ [4, 2, 0]  # the ES stack begins 4 columns and 2 rows later
    write_nifti(tmp_path / "es.nii", es[:, 2:, 4:], affine=shifted)
    phases = data.read_phases({"ed": tmp_path / "ed.nii", "es": tmp_path / "es.nii"})
    assert np.abs(phases["es"][:, 3:, 5:] - es[:, 3:, 5:]).max() < 0.1


def test_an_es_that_is_cropped_to_the_heart_meets_its_ed(tmp_path):
    ed, es = (np.pad(v, ((0, 0), (30, 30), (30, 30)), mode="edge") for v in heart_volumes())
    write_nifti(tmp_path / "ed.nii", ed, affine=oblique())
    shifted = oblique()
    shifted[:3, 3] += shifted[:3, :3] @ [30, 30, 0]
    write_nifti(tmp_path / "es.nii", es[:, 30:-30, 30:-30], affine=shifted)
    phases = data.read_phases({"ed": tmp_path / "ed.nii", "es": tmp_path / "es.nii"})
    assert np.abs(phases["es"] - es)[:, 31:-31, 31:-31].max() < 0.1


@pytest.mark.parametrize("placed", ["ed", "es"])
def test_a_phase_without_an_affine_lies_in_its_file_as_the_other_does(tmp_path, placed):
    """So that neither is mirrored against the other."""
    volumes = dict(zip(("ed", "es"), heart_volumes(), strict=True))
    turned = oblique()
    turned[:3, 0] *= -1  # columns run from right to left
    for name, volume in volumes.items():
        affine = turned if name == placed else None
        write_nifti(tmp_path / f"{name}.nii", volume, affine=affine)
    phases = data.read_phases({name: tmp_path / f"{name}.nii" for name in volumes})
    flip = -1 if placed == "ed" else 1
    for name, volume in volumes.items():
        np.testing.assert_allclose(phases[name], volume[..., ::flip], atol=1e-3)


def test_a_phase_without_an_affine_takes_over_which_axis_is_which(tmp_path):
    """Rows and columns change places, and with them pixels of 2.5 x 3 mm."""
    swapped = [volume.swapaxes(1, 2) for volume in heart_volumes()]
    affine = oblique((10, 2.5, 3))[:, [1, 0, 2, 3]]
    write_nifti(tmp_path / "ed.nii", swapped[0], affine=affine)
    write_nifti(tmp_path / "es.nii", swapped[1], spacing_mm=(10, 3, 2.5))
    phases = data.read_phases({name: tmp_path / f"{name}.nii" for name in ("ed", "es")})
    np.testing.assert_allclose(phases["spacing_mm"], (10, 2.5, 3), atol=1e-5)
    for name, volume in zip(("ed", "es"), heart_volumes(), strict=True):
        np.testing.assert_allclose(phases[name], volume, atol=1e-3)


# ---------------------------------------------------------------- millimetre grid


def ellipsoid(shape, spacing_mm, radii_mm, parts=4):
    """Fraction of each voxel within an ellipsoid in the middle, by parts^3 points a voxel."""
    fine = [
        ((np.arange(n * parts) + 0.5) / parts - n / 2) * mm / r
        for n, mm, r in zip(shape, spacing_mm, radii_mm, strict=True)
    ]
    inside = sum(np.square(x) for x in np.ix_(*fine)) < 1
    blocks = inside.reshape(shape[0], parts, shape[1], parts, shape[2], parts)
    return blocks.mean(axis=(1, 3, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "spacing", [(10, 1.4, 1.4), (8, 1.8, 1.8), (5, 1.25, 1.25), (10, 3, 3), (12, 2.5, 2)]
)
@pytest.mark.parametrize("grid_mm", [(10, 3, 3), (10, 6, 6), (8, 2, 2)])
def test_resampling_conserves_the_volume_of_an_ellipsoid(spacing, grid_mm):
    radii = (42, 26, 24)
    shape = tuple(round(size / mm) for size, mm in zip((110, 150, 150), spacing, strict=True))
    fractions = ellipsoid(shape, spacing, radii)
    grid = tuple(round(size / mm) for size, mm in zip((120, 192, 192), grid_mm, strict=True))
    middle = [(n - 1) / 2 for n in shape]
    weights = data.box_weights(shape, spacing, middle, grid, grid_mm)
    volume = data.resample(fractions, weights).sum() * np.prod(grid_mm)
    assert volume == pytest.approx(4 / 3 * np.pi * np.prod(radii), rel=0.015)


def test_a_stack_of_the_grids_spacing_is_cropped_without_blur():
    volume = np.random.default_rng(0).random((12, 72, 72)).astype(np.float32)
    weights = data.box_weights(volume.shape, (10, 3, 3), (5.5, 38, 33), (12, 64, 64), (10, 3, 3))
    out = data.resample(volume, weights)
    np.testing.assert_array_equal(out, volume[:, 6:70, 2:66])


def test_one_box_and_one_window_for_both_phases():
    ed, es = (v.astype(np.float32) for v in heart_volumes((10, 72, 72)))
    phases = {"ed": ed, "es": es, "spacing_mm": np.array([10, 3, 3]), "mask": None, "warnings": []}
    both = data.center_heart(phases)
    swapped = data.center_heart(phases | {"ed": es, "es": ed})
    np.testing.assert_array_equal(both["ed"], swapped["es"])
    assert any("more blood" in text for text in swapped["warnings"]) and both["warnings"] == []
    inside = both["weights"][0].sum(axis=1) > 0.5  # slices within the stack
    values = {v: (both["ed"][inside] == v).sum() for v in (0, 255)}
    # Blood is the same grey level at both phases, its volume is not.
    assert (
        both["ed"].max() == both["es"].max() == 255
        and values[255] > 1.5 * (both["es"] == 255).sum()
    )
    shifted = data.center_heart(
        phases | {name: np.roll(phases[name], 5, axis=2) for name in ("ed", "es")}
    )
    assert np.abs(shifted["ed"].astype(int) - both["ed"]).mean() < 12  # the box follows the heart
    masked = data.center_heart(phases | {"mask": np.roll(ed > 200, 8, axis=1)})
    assert (
        np.abs(masked["ed"].astype(int) - both["ed"]).mean() > 20
    )  # and the mask, where there is one


def phantom_cine(heart, contraction, noise=0.02):
    """Cine (Z, Y, X, T) of the phantom, contraction[t] from 0 (ED) to 1 (ES)."""
    rng, frames = np.random.default_rng(1), []
    for part in contraction:
        state = heart | {"LVEF_pct": max(part * heart["LVEF_pct"], 1e-3)}
        for side in ("LV", "RV"):
            stroke = heart[f"{side}EDV_ml"] - heart[f"{side}ESV_ml"]
            state[f"{side}ESV_ml"] = heart[f"{side}EDV_ml"] - part * stroke
        tissue = data.phantom(state, np.random.default_rng(0))["es"]
        picture = 0.2 + 0.8 * (tissue["lv"] + tissue["rv"]) + 0.1 * tissue["myocardium"]
        frames.append(500 * (picture + noise * rng.standard_normal(picture.shape)))
    return np.stack(frames, axis=-1).astype(np.float32)


@pytest.mark.parametrize("subject", [0, 3, 11])
def test_es_frame_is_estimated_from_a_cine_and_reported(tmp_path, subject):
    contraction = np.array([0, 0.3, 0.6, 0.85, 1, 0.8, 0.5, 0.3, 0.2, 0.1])
    cine = phantom_cine(data.draw_heart(0, subject), contraction)
    assert data.estimate_es_frame(cine, cine[..., 0], np.array([10, 3, 3])) == 4
    write_nifti(tmp_path / "cine.nii", cine)
    row = {"cine": tmp_path / "cine.nii", "ed_frame": "", "es_frame": ""}
    phases = data.read_phases(row)
    np.testing.assert_array_equal(phases["es"], cine[..., 4])
    assert phases["warnings"] == ["ES frame was estimated from the images"]
    given = data.read_phases(row | {"ed_frame": "1", "es_frame": "7"})
    np.testing.assert_array_equal(given["ed"], cine[..., 1])
    np.testing.assert_array_equal(given["es"], cine[..., 7])
    assert given["warnings"] == []
    as_pandas = data.read_phases(row | {"ed_frame": "1.0", "es_frame": "nan"})
    np.testing.assert_array_equal(as_pandas["ed"], cine[..., 1])
    assert as_pandas["warnings"] == phases["warnings"]


# ---------------------------------------------------------------- synthetic hearts


def test_phantom_volumes_are_the_stated_ones():
    for subject in range(40):
        heart = data.draw_heart(0, subject)
        phases = data.phantom(heart, np.random.default_rng([0, subject, 1]))
        ml = np.prod(data.STACK_MM) / 1000
        for phase, tissues in phases.items():
            end = f"E{phase[1].upper()}V_ml"
            assert tissues["lv"].sum() * ml == pytest.approx(heart[f"LV{end}"], rel=0.01)
            assert tissues["rv"].sum() * ml == pytest.approx(heart[f"RV{end}"], rel=0.01)
            assert tissues["myocardium"].sum() * ml == pytest.approx(
                heart["LVM_g"] / 1.05, rel=0.01
            )
            assert all(-1e-6 <= part.min() and part.max() <= 1 + 1e-6 for part in tissues.values())


PETERSEN = {  # mean and standard deviation of women, men; J Cardiovasc Magn Reson 2017, 19:18
    "LVEDV_ml": (124, 21, 166, 32),
    "LVESV_ml": (49, 11, 69, 16),
    "LVEF_pct": (61, 5, 58, 5),
    "LVM_g": (70, 13, 103, 21),
    "RVEDV_ml": (130, 24, 182, 36),
    "RVEF_pct": (58, 6, 54, 6),
}


@pytest.mark.parametrize("seed", [0, 1])
def test_synthetic_cohort_has_the_published_means_and_spreads(seed):
    hearts = [data.draw_heart(seed, subject) for subject in range(3000)]
    for sex in (0, 1):
        for name, stated in PETERSEN.items():
            values = np.array([heart[name] for heart in hearts if heart["sex"] == sex])
            mean, spread = stated[2 * sex : 2 * sex + 2]
            assert values.mean() == pytest.approx(mean, rel=0.15), (name, sex)
            assert 0.85 * spread <= values.std() <= 2 * spread, (name, sex, values.std())
    assert 0.45 < np.mean([heart["sex"] for heart in hearts]) < 0.52
    for name in ("heart_failure", "atrial_fibrillation", "hypertension"):
        assert 0.03 < np.mean([heart[name] for heart in hearts]) < 0.5


def test_a_subject_depends_on_seed_and_number_alone():
    a, b = data.simulate(3, 7), data.simulate(3, 7)
    other = data.simulate(4, 7)
    np.testing.assert_array_equal(a["ecg_mv"], b["ecg_mv"])
    np.testing.assert_array_equal(a["phases"]["ed"], b["phases"]["ed"])
    assert a["heart"] == b["heart"] != other["heart"]


def test_heart_rate_of_the_synthetic_ecg_is_the_hearts():
    for subject in range(5):
        raw = data.simulate(0, subject)
        ecg = data.clean_ecg(raw["ecg_mv"], 500)["ecg"]
        assert beats_per_minute(ecg) == pytest.approx(raw["heart"]["heart_rate_bpm"], rel=0.06)


def test_demo_files_prepared_are_the_synthetic_cohort(tmp_path):
    """Bound: no difference, as the simulated recorder stores 5 microvolt and whole grey levels."""
    data.synthesize(tmp_path / "direct", 6, seed=2, workers=2)
    data.write_demo(tmp_path / "raw", 6, seed=2)
    ends = {path.suffix for path in (tmp_path / "raw").iterdir()}
    assert ends == {".xml", ".hea", ".dat", ".mat", ".gz", ".csv"}
    # The demo's masks centre the heart, and so do the synthetic ones.
    data.prepare(tmp_path / "raw" / "manifest.csv", tmp_path / "prepared", workers=2)
    for name in ("ecg.npy", "ed.npy", "es.npy", "subjects.csv"):
        pair = [(tmp_path / folder / name).read_bytes() for folder in ("direct", "prepared")]
        assert pair[0] == pair[1], name


# ---------------------------------------------------------------- splits, cohort, batches


def test_no_other_row_moves_a_subject_to_another_split(tmp_path):
    ids = [f"{k:04d}" for k in range(2000)]

    def splits(order):
        path = tmp_path / "m.csv"
        path.write_text("id,ecg,ed,es\n" + "".join(f"{k},e.xml,d.nii,s.nii\n" for k in order))
        return {row["id"]: row["split"] for row in data.read_manifest(path)["rows"]}

    whole = splits(ids)
    assert splits(ids[::-1]) == whole  # reordered
    assert splits(ids[500:]) == {k: whole[k] for k in ids[500:]}  # removed
    assert {k: v for k, v in splits([*ids, "x", "y"]).items() if k in whole} == whole  # added
    shares = [np.mean([v == name for v in whole.values()]) for name in ("train", "val", "test")]
    np.testing.assert_allclose(shares, (0.70, 0.15, 0.15), atol=0.03)


def test_manifest_keeps_leading_zeros_and_sorts_columns_by_kind(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(
        "\ufeffid;ecg;ed;es;age;LVEDV_ml;diagnosis\n007;a.xml;b.nii;c.nii;61;;DCM\n".encode()
    )
    manifest = data.read_manifest(path)
    assert manifest["columns"] == ["age"] and set(manifest["ignored"]) == {"LVEDV_ml", "diagnosis"}
    assert manifest["rows"][0]["id"] == "007"
    assert manifest["rows"][0]["ecg"] == str(tmp_path / "a.xml")


def test_a_table_as_a_german_excel_writes_it(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id;ecg;ed;es;LVEDV_ml;bulk;;\n1,5;a,1;b;c;120,5;1_20209_2_0;;\n")
    manifest = data.read_manifest(path)
    assert Path(manifest["rows"][0]["ecg"]).name == "a,1" and manifest["rows"][0]["id"] == "1,5"
    assert manifest["columns"] == ["LVEDV_ml"] and "bulk" in manifest["ignored"]
    assert manifest["rows"][0]["LVEDV_ml"] == "120.5" and "wrong" not in manifest["rows"][0]


@pytest.mark.parametrize("sex", ["", "nan", "1.0"])
def test_an_unknown_sex_is_no_mistake(tmp_path, sex):
    (tmp_path / "m.csv").write_text(f"id,ecg,ed,es,sex\n1,a,b,c,{sex}\n2,a,b,c,0\n")
    assert "wrong" not in data.read_manifest(tmp_path / "m.csv")["rows"][0]


def test_cohort_folder_is_as_the_contract_says(cohort_folder):
    about = json.loads((cohort_folder / "cohort.json").read_text())
    assert about["format_version"] == 1 and about["leads"] == list(data.LEADS)
    assert about["grid"] == [12, 32, 32] and about["spacing_mm"] == [10, 6, 6]
    assert about["sampling_rate_hz"] == 250 and about["counts"]["subjects"] == 64
    assert np.load(cohort_folder / "ecg.npy").dtype == np.int16
    assert np.load(cohort_folder / "es.npy").shape == (64, 12, 32, 32)
    cohort = data.open_cohort(cohort_folder)
    assert cohort["phenotypes"][0] == "LVEDV_ml" and cohort["covariates"] == ["age", "sex", "bmi"]
    assert cohort["outcomes"] == ["heart_failure", "atrial_fibrillation", "hypertension"]
    assert not list(cohort_folder.parent.glob("*.partial"))


def test_batches_are_millivolt_and_zero_to_one(cohort_folder):
    cohort, rows = data.open_cohort(cohort_folder), [5, 2, 9]
    batch = data.read_batch(cohort, rows)
    ecg, ed = (np.load(cohort_folder / f"{name}.npy") for name in ("ecg", "ed"))
    assert all(x.dtype == torch.float32 for x in batch.values())
    np.testing.assert_allclose(batch["ecg"], ecg[rows] / 1000, atol=1e-6)
    np.testing.assert_allclose(batch["ed"][:, 0], ed[rows] / 255, atol=1e-6)
    assert (
        batch["es"].shape == (3, 1, 12, 32, 32) and 0 <= batch["es"].min() <= batch["es"].max() <= 1
    )
    crossed = data.read_batch(cohort, rows, ecg_rows=[1, 1, 1])
    np.testing.assert_allclose(crossed["ecg"][2], ecg[1] / 1000, atol=1e-6)
    assert torch.equal(crossed["ed"], batch["ed"])


def test_epochs_hold_every_subject_once_in_an_order_of_seed_and_epoch():
    rows = np.arange(100, 143)
    batches = data.epoch_batches(rows, 8, 0, 0)
    assert [len(batch) for batch in batches] == [8] * 5
    assert len(set(np.concatenate(batches))) == 40 and set(np.concatenate(batches)) <= set(rows)
    assert np.array_equal(batches, data.epoch_batches(rows, 8, 0, 0))
    assert not np.array_equal(batches, data.epoch_batches(rows, 8, 0, 1))


def test_read_ahead_keeps_the_order_and_passes_errors_on():
    assert list(data.read_ahead(lambda k: k * k, range(7))) == [k * k for k in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(data.read_ahead(lambda k: 1 / k, [1, 0]))


def test_augmentation_depends_on_seed_epoch_and_subject_only(cohort_folder):
    cohort = data.open_cohort(cohort_folder)

    def augmented(rows, seed=0, epoch=0):
        return data.read_batch(cohort, rows, varied=(seed, epoch))

    one, other = augmented([3, 5, 7]), augmented([7, 1])
    for name in ("ecg", "ed", "es"):
        assert one[name].shape == data.read_batch(cohort, [3, 5, 7])[name].shape
        assert torch.equal(one[name][2], other[name][0])
        assert not torch.equal(one[name][2], augmented([7], epoch=1)[name][0])
        assert not torch.equal(one[name][2], augmented([7], seed=1)[name][0])


def test_augmentation_of_a_grid_larger_than_the_table_of_noise():
    grid = (20, 240, 240)
    stored = {"ecg": torch.zeros(1, *data.ECG_SHAPE), "ed": torch.zeros(1, *grid)}
    assert np.prod(grid) > len(data.noise_table(0, torch.device("cpu"), 1))
    assert data.augment(stored, [0], seed=0, epoch=0)["ed"].std() > 1e-3


def test_augmentation_of_a_single_subject(cohort_folder):
    cohort = data.open_cohort(cohort_folder)  # in some epochs no subject of the batch is moved
    for epoch in range(8):
        assert data.read_batch(cohort, [3], varied=(0, epoch))["ed"].isfinite().all()


def test_both_phases_move_alike_and_are_never_mirrored(monkeypatch):
    monkeypatch.setattr(data, "noise_table", lambda seed, device, rounds: torch.zeros(2**20))
    ed = torch.zeros(64, 4, 32, 32, dtype=torch.uint8)
    ed[..., 12:20, 4:9] = 255  # the right ventricle, on the left of the image
    for epoch in range(4):
        stored = {"ecg": torch.zeros(64, 12, 2500, dtype=torch.int16), "ed": ed, "es": ed}
        out = data.augment(stored, np.arange(64), 0, epoch)
        assert torch.equal(out["ed"], out["es"])
        bright = (out["ed"] > 0.5).float()
        column = (bright * torch.arange(32)).sum((1, 2, 3, 4)) / bright.sum((1, 2, 3, 4))
        assert column.max() < 13  # the image's middle is 15.5
        area = bright.sum((1, 2, 3, 4)) / 4
        assert (area - 40).abs().max() < 12  # no scaling
        moved = (out["ed"][:, 0] > 0.5).ne(ed > 127).flatten(1).any(1).float().mean()
        assert 0.02 < moved < 0.35  # one subject of seven


def test_a_turn_is_rigid_in_mm_on_pixels_that_are_no_squares(monkeypatch):
    monkeypatch.setattr(data, "noise_table", lambda seed, device, rounds: torch.zeros(2**20))
    spacing, places = (10, 1.5, 6), ((24, 20), (40, 20), (40, 14))
    y, x = np.mgrid[:64, :32] * np.array([[[1.5]], [[6]]])  # mm
    found = []
    for row, column in places:  # a blob in ED and ES each time; none is drawn over another
        blob = 255 * np.exp(-((y - row * 1.5) ** 2 + (x - column * 6) ** 2) / (2 * 9**2))
        one = torch.from_numpy(blob.astype(np.uint8)).expand(64, 1, 64, 32)
        stored = {"ecg": torch.zeros(64, 12, 2500, dtype=torch.int16), "ed": one}
        out = data.augment(stored, np.arange(64), 0, 0, spacing)["ed"][:, 0, 0].numpy()
        out = (out - out.min(axis=(1, 2), keepdims=True)).clip(0)
        weight = out.sum(axis=(1, 2))
        found.append(np.stack([(out * place).sum(axis=(1, 2)) / weight for place in (y, x)], 1))
    for (a, b), wanted in (((0, 1), 24), ((1, 2), 36)):  # mm between blobs
        distance = np.linalg.norm(found[a] - found[b], axis=1)
        assert np.abs(distance - wanted).max() < 1.5, distance


def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_cohort(cohort_folder, tmp_path):
    shapes = {"ecg": (12, 2500), "ed": (12, 32, 32), "es": (12, 32, 32)}
    peaks = {}
    for count in (640, 6400):  # 54 and 540 MB
        folder = tmp_path / str(count)
        folder.mkdir()
        for name, shape in shapes.items():
            small = np.load(cohort_folder / f"{name}.npy")
            with open(folder / f"{name}.npy", "wb") as file:
                head = {"descr": small.dtype.str, "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(file, head)
                file.truncate(file.tell() + count * small[0].nbytes)  # sparse: no room on disk
        cohort = {"folder": folder}
        before, peak = resident_mb(), 0
        for rows in data.epoch_batches(np.arange(count), 64, 0, 0)[:10]:
            data.read_batch(cohort, rows)
            peak = max(peak, resident_mb() - before)
        peaks[count] = peak
    assert peaks[6400] < peaks[640] + 20, peaks


def test_show_draws_a_subject(cohort_folder, tmp_path):
    data.show(data.open_cohort(cohort_folder), "000003", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    cohort = data.open_cohort(cohort_folder)
    cohort["columns"] |= {"cost_$": np.ones(99), "x_$_\\y": np.ones(99)}  # no formulas
    data.show(cohort, "000003", tmp_path / "b.png")


# ---------------------------------------------------------------- real files


@real
def test_two_readers_give_one_truth():
    for number in range(6000, 6005):
        a, b = (
            data.read_clean_ecg(REAL / "ecg" / f"{name}.hea")["ecg"]
            for name in (f"HR{number:05d}", f"{number:05d}_hr")
        )
        assert np.array_equal(a, b)


@real
def test_the_athletes_heart_rate_survives():
    path = REAL / "ecg" / "cardiosoft_example1.xml"
    assert data.read_ecg(path)["ecg_mv"].shape == (12, 5000)
    assert beats_per_minute(data.read_clean_ecg(path)["ecg"]) == pytest.approx(42, abs=1.5)


@real
def test_real_ecgs_are_read_or_refused_for_a_known_reason():
    refused = {}
    for path in sorted((REAL / "ecg").glob("*.hea")):
        try:
            data.read_clean_ecg(path)
        except data.InputError as error:
            refused[path.stem] = error.why
    assert "V2, V4, V6" in refused["JS20004"] and "flat" in refused["JS20004"]
    assert set(refused) == {"JS20004"}, refused


def patient_files():
    for folder in sorted((REAL / "acdc").iterdir()) if REAL else []:
        ed, es = sorted(folder.glob("*_frame??.nii.gz"))
        yield pytest.param(ed, es, id=folder.name)


@real
@pytest.mark.parametrize(("ed", "es"), list(patient_files()) or [(None, None)])
def test_real_hearts_keep_their_volume_inside_the_box(ed, es):
    phases = data.read_phases({"ed": str(ed), "es": str(es)})
    heart = data.center_heart(phases)
    ml = {}
    for phase, path in (("ed", ed), ("es", es)):
        nifti = data.open_nifti(path.with_name(path.name.replace(".nii", "_gt.nii")))
        labels = data.read_voxels(nifti)
        old_ml, new_ml = np.prod(nifti["spacing_mm"]) / 1000, np.prod(data.SPACING_MM) / 1000
        cavity = (labels == 3).astype(np.float32)
        ml[phase] = data.resample(cavity, heart["weights"]).sum() * new_ml
        assert ml[phase] == pytest.approx(cavity.sum() * old_ml, rel=0.03)
        whole = (labels > 0).any(axis=0)  # (Y, X): every labelled voxel has its full weight
        kept = [(weights > 0).any(axis=0) for weights in heart["weights"]]
        assert kept[1][whole.any(axis=1)].all() and kept[2][whole.any(axis=0)].all()
    assert ml["es"] < ml["ed"]
    assert not any("more blood" in text for text in heart["warnings"])
