"""data.py on real files: REAL_DATA names a folder with acdc/ and ecg/ (see the README)."""

import csv
import os

import nibabel
import numpy as np
import pytest
import raw_files as raw

import data

NO_AFFINE = "no affine along a heart, axes stay as stored: look with data.py show"


def records(real_data):
    """Paths of all ECGs but the one that is refused."""
    paths = [*(real_data / "ecg").glob("*.hea"), *(real_data / "ecg").glob("*.xml")]
    return [path for path in sorted(paths) if path.stem != "JS20004"]


def patients(real_data):
    """Of each ACDC patient (ED, ES, labels of ED, labels of ES), as paths."""
    hearts = []
    for folder in sorted((real_data / "acdc").glob("patient*")):
        images = sorted(folder.glob("*_frame??.nii.gz"))
        hearts.append([*images, *sorted(folder.glob("*_gt.nii.gz"))])
    return hearts


def test_all_ecgs_are_kept_but_one_with_flat_leads(real_data):
    ecgs = {path.stem: data.read_ecg({"ecg": path}, "") for path in records(real_data)}
    assert len(ecgs) >= 25
    assert [name for name, (_, warnings) in ecgs.items() if warnings] == []
    with pytest.raises(data.InputError, match="JS20004.hea: lead V2, V4, V6 is flat"):
        data.read_ecg({"ecg": "JS20004.hea"}, real_data / "ecg")
    for number in range(6000, 6005):  # two readers, one truth
        assert np.array_equal(ecgs[f"{number:05d}_hr"][0], ecgs[f"HR{number:05d}"][0])


@pytest.mark.parametrize("patient", range(6))
def test_both_ventricles_lie_whole_in_the_middle_of_the_box(patient, real_data):
    """Label maps are cropped by the code and the box of the images."""
    ed, es, *labels = patients(real_data)[patient]
    scan = data.read_scan({"ed": ed, "es": es}, ed.parent)
    assert data.crop_heart(scan)[1] == [NO_AFFINE]
    box = np.zeros(scan.phases["ed"].shape, bool)
    box[data.motion_box(scan.phases["ed"], scan.phases["es"], scan.spacing_mm)] = True
    maps = [nibabel.load(path).get_fdata().transpose(2, 1, 0) for path in labels]
    hearts = [label > 0 for label in maps]
    cavities = [label == 3 for label in maps]  # of the LV
    for stored in (cavities, hearts):
        cropped, _ = data.crop_heart(raw.scan_of(*stored, scan.spacing_mm, box))
        for phase, voxels in zip(data.PHASES, stored, strict=True):
            kept_mm3 = cropped[phase].sum(dtype=float) / 255 * np.prod(data.SPACING_MM)
            assert kept_mm3 == pytest.approx(voxels.sum() * scan.spacing_mm.prod(), rel=0.01)
    middle = np.argwhere(cropped["ed"] > 127).mean(axis=0)
    from_box_mm = (middle - (np.array(data.GRID) - 1) / 2) * data.SPACING_MM
    assert np.abs(from_box_mm).max() < 45  # patient004: 40 mm


def bad_cells(real_data, folder):
    """Twenty ways to spoil a row of patient001, [(cells, words of the sentence)]; writes files."""
    ed, _, labels, _ = patients(real_data)[0]
    _, other_es, other_labels, _ = patients(real_data)[1]
    ecg = real_data / "ecg"
    header = (ecg / "HR06000.hea").read_bytes()
    samples = (ecg / "HR06000.mat").read_bytes()
    (folder / "cut.hea").write_bytes(header.replace(b"HR06000.mat", b"cut.mat"))
    (folder / "cut.mat").write_bytes(samples[:-1000])
    (folder / "bit.hea").write_bytes(header.replace(b"HR06000.mat", b"bit.mat"))
    (folder / "bit.mat").write_bytes(raw.flipped(samples, 40_000))
    (folder / "cut.nii.gz").write_bytes(ed.read_bytes()[:90_000])
    (folder / "bit.nii.gz").write_bytes(raw.flipped(ed.read_bytes(), 800_000))
    (folder / "cut.xml").write_bytes((ecg / "cardiosoft_example1.xml").read_bytes()[:40_000])
    np.save(folder / "nan.npy", np.full((12, 5000), np.nan))
    shape = nibabel.load(ed).shape[::-1]
    raw.write_as_acdc(folder / "empty.nii", np.zeros(shape, np.int16), (10, 1.5625, 1.5625))
    return [
        ({"ecg": ecg / "JS20004.hea"}, "lead V2, V4, V6 is flat"),
        ({"ecg": "nowhere.hea"}, "nowhere.hea: does not exist"),
        ({"ecg": "cut.hea"}, "cut.mat: ends before"),
        ({"ecg": "bit.hea"}, "bit.mat: differs from its checksum"),
        ({"ecg": "cut.xml"}, "cut.xml: cannot be read"),
        ({"ecg": ""}, "names no ECG"),
        ({"sex": "2"}, "sex '2' must be 0"),
        ({"ecg": "nan.npy"}, "nan.npy: holds missing"),
        ({"ecg": ed}, "is none of .xml, .hea, .npy"),
        ({"ed": "cut.nii.gz"}, "cut.nii.gz: cannot be read"),
        ({"ed": "bit.nii.gz"}, "bit.nii.gz: cannot be read"),
        ({"es": other_es}, "its grid"),
        ({"es": ed}, "ED and ES are one image"),
        ({"mask": other_labels}, "its grid"),
        ({"mask": "empty.nii"}, "empty.nii: labels 0 ml"),
        ({"cine": ed}, "but 4D is needed"),
        ({"es": ""}, "no pair of ED and ES"),
        ({"age": "old"}, "age 'old' is no number"),
        ({"split": "holdout"}, "split 'holdout' must be"),
        ({"id": "000"}, "id stands in line 2 already"),
    ]


def mixed_rows(real_data, folder):
    """200 rows, each heart with each ECG in turn, masks on half, every tenth spoilt.

    Returns them, words that rejected.csv must hold, row by row, and all of warnings.csv.
    """
    paths = records(real_data)
    spoilt = bad_cells(real_data, folder)
    rows = []
    warnings = []
    first_rows = {}  # by what a row shows
    for k in range(200):
        is_bad = k % 10 == 9
        ed, es, labels, _ = patients(real_data)[0 if is_bad else k % 6]
        row = {"id": f"{k:03d}", "ecg": paths[k % len(paths)], "ed": ed, "es": es, "cine": ""}
        row.update(mask=labels if k % 4 > 1 else "", split=data.SPLITS[k % 3], age="60", sex="1")
        rows.append(row)
        if is_bad:
            row.update(spoilt[k // 10][0])
            continue
        warnings.append([row["id"], NO_AFFINE])
        person = row["ecg"].stem.replace("HR", "").replace("_hr", "")  # two files of one ECG
        for name, shown in (("ecg", person), ("ed", (row["ed"], row["mask"]))):
            first = first_rows.setdefault(shown, row)
            leak = "LEAK between splits, " if first["split"] != row["split"] else ""
            if first is not row:
                warnings.append([row["id"], f"{leak}same {name} array as in row: {first['id']}"])
    return rows, [words for _, words in spoilt], warnings


def test_of_200_mixed_rows_every_good_one_is_kept(real_data, tmp_path, capsys):
    rows, words, expected_warnings = mixed_rows(real_data, tmp_path)
    manifest = raw.write_manifest(tmp_path, rows)
    started_s = sum(os.times()[2:4])  # CPU time of all processes that have ended
    folder = tmp_path / "cohort"
    data.prepare(manifest, folder, workers=2)
    assert sum(os.times()[2:4]) - started_s < 200 * 2 / 20  # 20 subjects a second on 2 cores
    ids = data.open_cohort(folder).ids.tolist()
    assert ids == [f"{k:03d}" for k in range(200) if k % 10 < 9]
    rejected = list(csv.reader((folder / "rejected.csv").read_text().splitlines()))[1:]
    assert [subject for subject, _ in rejected] == [row["id"] for row in rows[9::10]]
    assert all(text in reason for text, (_, reason) in zip(words, rejected, strict=True))
    warnings = list(csv.reader((folder / "warnings.csv").read_text().splitlines()))[1:]
    assert warnings == expected_warnings
    prepared = capsys.readouterr().out.splitlines()
    assert data.check(manifest) == 2
    checked = capsys.readouterr().out.splitlines()
    assert checked[:-1] == prepared[:-1] and "180 of 200 rows are usable" in checked[-1]
