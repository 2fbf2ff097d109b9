"""Every bad input gets one sentence that names the file and the rule; what is good is kept."""

import csv
import gzip
import io
import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import raw_files as raw
from raw_files import changed, dimensions, replaced

import data

# ---------------------------------------------------------------- rows of a manifest

ECG = raw.rhythm()
TEXT = raw.xml_text(ECG)
ED, ES = raw.heart_volumes()
LABELS = 0 * ED
LARGE = np.tile(ED, (1, 3, 3))
FLOAT = ED.astype(np.float32)
ENTITIES = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><CardiologyXML>&b;</CardiologyXML>'
SPY = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><CardiologyXML>&a;</CardiologyXML>'
BOMB = gzip.compress(bytes(500_000_000), 1)
FAR = raw.oblique() + np.array([[0, 0, 0, 400]] * 3 + [[0, 0, 0, 0]])
PASSWORDS = "a 12 500 5000\n" + 12 * "/etc/passwd 16 1000/mV 16 0 0 0 0 I\n"
NO_AFFINE = {"affine": np.eye(4), "pixdim": (3, 3, 10)}
LONG = "x" * 999

ROWS = [  # name, kind and content of raw_files.write_bad, words of the sentence
    ("XML: cut", "xml", TEXT[:9000], "cannot be read"),
    ("XML: binary", "xml", bytes(range(256)), "cannot be read"),
    ("XML: of 21 MB", "xml", bytes(21_000_000), "is larger than 20 MB"),
    ("XML: entities", "xml", ENTITIES, "declares XML entities"),
    ("XML: entities in UTF-16", "xml", ENTITIES.encode("utf-16"), "declares XML entities"),
    ("XML: another file", "xml", SPY, "declares XML entities"),
    ("XML: other vendor", "xml", "<restingecgdata/>", "has no StripData"),
    ("XML: 11 leads", "xml", replaced('lead="V6"', 'lead="X"', True), "holds lead V6 0 times"),
    ("XML: a lead twice", "xml", replaced('lead="V6"', 'lead="V5"', True), "lead V5 2 times"),
    ("XML: no rate", "xml", TEXT.replace("SampleRate", "Rate"), "rate is nan Hz"),
    ("XML: rate of 5 Hz", "xml", replaced(">500<", ">5<", True), "rate is 5 Hz"),
    ("XML: resolution below 0", "xml", replaced(">5<", ">-5<", True), "no Resolution from 0.01"),
    ("ECG: 8 s", "xml", ECG[:, :4000], "10 s are needed"),
    ("ECG: a flat lead", "xml", changed(ECG, 8, 0.1), "lead V3 is flat"),
    ("ECG: arms exchanged", "xml", changed(ECG, [0, 1], ECG[[1, 0]]), "contradict Einthoven"),
    ("ECG: 56 mV", "xml", 40 * ECG, "as no heart does"),
    ("ECG: missing", "row", {"ecg": "nowhere.xml"}, "does not exist"),
    ("ECG: a folder", "row", {"ecg": "folder.xml"}, "is a folder"),
    ("ECG: a name of 999", "row", {"ecg": f"{LONG}.xml"}, "does not exist"),
    ("ECG: other suffix", "row", {"ecg": "good0_ed.nii.gz"}, "is none of .xml, .hea, .npy"),
    ("WFDB: no signals", "hea", replaced(".dat 16 ", "x.dat 16 "), "x.dat: does not exist"),
    ("WFDB: cut", "dat", lambda content: content[:-1], "ends before the 5000 samples"),
    ("WFDB: one bit", "dat", lambda content: b"\1" + content[1:], "differs from its checksum"),
    ("WFDB: format 212", "hea", replaced(".dat 16 ", ".dat 212 "), "signal lines of format 16"),
    ("WFDB: gain 0", "hea", replaced(" 1000/", " 0/"), "gain 0 is not positive"),
    ("WFDB: a pressure", "hea", replaced("/mV", "/mmHg"), "unit 'mmHg' is none of mV"),
    ("WFDB: segments", "hea", "bad/2 12 500 5000\na 2500\nb 2500\n", "signal lines"),
    ("WFDB: another folder", "hea", PASSWORDS, "/passwd: does not exist"),
    ("WFDB: 99 signals", "hea", replaced(" 12 500", " 99 500"), "has not 99 signal lines"),
    ("WFDB: 10^15 samples", "hea", replaced(" 5000\n", f" {10**15}\n"), "ends before the 1000000"),
    ("WFDB: binary", "hea", bytes(999), "cannot be read"),
    ("npy: 11 leads", "npy", ECG[:11], "is float64 (11, 5000)"),
    ("npy: objects", "npy", np.array([{}] * 12), "cannot be read"),
    ("npy: NaN", "npy", changed(ECG, (3, 7), np.nan), "missing or non-finite"),
    ("npy: µV", "npy", 1000 * ECG, "check gain and unit"),
    ("npy: rate as text", "row", {"ecg": "good.npy", "ecg_hz": "fast"}, "rate is nan Hz"),
    ("NIfTI: cut", "ed", lambda content: content[:-1], "cannot be read"),
    ("NIfTI: gz checksum", "ed gz", lambda content: content[:-8] + b"12345678", "CRC"),
    ("NIfTI: zip bomb", "ed gz", BOMB, "unpacks to over"),
    ("NIfTI: 10^12 voxels", "ed", dimensions(3, 10000, 10000, 10000), "but holds fewer"),
    ("NIfTI: negative size", "ed", dimensions(3, -48, 44, 10), "but holds fewer"),
    ("NIfTI: 4D as a phase", "ed", np.stack([ED, ES], axis=-1), "is 4D (48, 44, 10, 2)"),
    ("NIfTI: one slice", "ed", ED[:1], "too little for a heart"),
    ("NIfTI: spacing lost", "ed", {"volume": LARGE, "affine": np.eye(4)}, "[1.0, 1.0, 1.0] mm"),
    ("NIfTI: spacing 0", "ed", {"pixdim": (3, 3, 0)}, "[3.0, 3.0, 0.0] mm is not positive"),
    ("NIfTI: a NaN voxel", "ed", changed(FLOAT, (3, 9, 9), np.nan), "holds NaN, infinite"),
    ("NIfTI: complex", "ed", ED.astype(np.complex64), "holds complex64 voxels"),
    ("NIfTI: one grey level", "ed", 0 * ED, "one constant grey level"),
    ("NIfTI: ED as ES", "row", {"es": "good0_ed.nii.gz"}, "ED and ES are one image"),
    ("NIfTI: a name of 999", "row", {"es": f"{LONG}.nii"}, "does not exist"),
    ("NIfTI: other spacing", "es", {**NO_AFFINE, "pixdim": (2, 2, 10)}, "its spacing (10"),
    ("NIfTI: ED less a slice as ES", "es", changed(ED, 0, 0), "; "),
    ("NIfTI: ES elsewhere", "es", {"affine": FAR}, "meets 0% of ED"),
    (
        "cine: frame 3 of 3",
        "row",
        {"cine": "c.nii", "es_frame": "3"},
        "is no frame number from 0",
    ),
    ("cine: frame 1.5", "row", {"cine": "c.nii", "es_frame": "1.5"}, "es_frame '1.5'"),
    ("cine: still", "cine", np.stack([ED, ED, ED], axis=-1), "ED and ES are one image"),
    ("cine: one grey level", "cine", 0 * np.stack([ED, ED], axis=-1), "one constant grey level"),
    ("mask: a corner", "mask", changed(LABELS, np.s_[0, 0, 0], 1), "labels 0 ml, not 20 to 1500"),
    ("mask: everything", "mask", LABELS + 1, "labels 1901 ml, not 20 to 1500"),
    ("mask: what is still", "mask", changed(LABELS, np.s_[:, :9, :9], 1), "labels what does not"),
    ("mask: elsewhere", "mask", {"affine": FAR}, "meets 0% of ED"),
    ("row: sex as text", "row", {"sex": "F"}, "sex 'F' is no number"),
    ("row: sex 2", "row", {"sex": "2"}, "sex '2' must be 0"),
    ("row: split", "row", {"split": "holdout"}, "split 'holdout' must be train, val or test"),
    ("row: empty id", "row", {"id": ""}, "has an empty id"),
    ("row: id twice", "row", {"id": "good0"}, "id stands in line 2 already"),
    ("row: no ECG", "row", {"ecg": ""}, "names no ECG"),
    ("row: no ES", "row", {"es": ""}, "no pair of ED and ES"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory, run_script):
    """All bad rows in one manifest, a good one before each tenth: what prepare and check say."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "folder.xml").mkdir()
    (folder / "folder.nii").mkdir()
    np.save(folder / "good.npy", ECG)
    raw.write_nifti(folder / "c.nii", np.stack([ED, ES, ED], axis=-1))
    rows = []
    bad_cells = []
    for k, (name, kind, content, _) in enumerate(ROWS):
        if k % 10 == 0:
            good = raw.write_subject(folder, f"good{k}", number=k)
            rows.append({**good, "sex": "1", "age": "60.5", "LVEF_pct": "55"})
        bad_cells.append(raw.write_bad(folder / f"bad{k}", kind, content))
        rows.append({**rows[0], "id": name, **bad_cells[-1]})
    manifest = raw.write_manifest(folder, rows)
    prepared = run_script("data.py", "prepare", manifest, "cohort", cwd=folder)
    checked = run_script("data.py", "check", manifest, cwd=folder)
    with open(folder / "cohort" / "rejected.csv", encoding="utf-8") as file:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    return prepared, checked, reasons, bad_cells


def test_bad_rows_cost_no_good_one_and_check_agrees_with_prepare(reports):
    prepared, checked, reasons, _ = reports
    cohort = data.open_cohort(Path(prepared.args[2]).parent / "cohort")
    assert cohort.ids.tolist() == [f"good{k}" for k in range(0, len(ROWS), 10)]
    assert len(reasons) == len(ROWS)
    assert (prepared.returncode, checked.returncode) == (0, 2)
    assert f"{len(cohort.ids)} of {len(cohort.ids) + len(ROWS)} rows are usable" in checked.stdout
    assert prepared.stdout.splitlines()[1:-1] == checked.stdout.splitlines()[1:-1]


@pytest.mark.parametrize("k", range(len(ROWS)), ids=[name for name, *_ in ROWS])
def test_a_bad_row_gets_one_sentence_with_file_and_rule(k, reports):
    _, _, reasons, bad_cells = reports
    name, _, _, words = ROWS[k]
    reason = reasons[bad_cells[k].get("id", name)]
    assert words in reason and reason.isprintable()
    files = [bad_cells[k].get(column, "") for column in data.FILE_COLUMNS]
    stems = [Path(file).stem for file in files if file] if name[:3] != "row" else ["manifest"]
    assert any(stem in reason for stem in [*stems, "/passwd"]), reason
    assert "; " in reason or " must " in reason, f"what to do? {reason}"
    assert "np.float" not in reason


# ---------------------------------------------------------------- whole files and command lines


@pytest.fixture
def refused(run_script):
    """refused(words, folder, script, …): exit code 2, one sentence, and no file changes."""

    def run(words, folder, *command):
        before = raw.files_below(folder)
        done = run_script(*command, cwd=folder)
        output = done.stdout + done.stderr
        sentence = done.stderr.splitlines()[-1]
        assert done.returncode == 2, output[-300:]
        assert "error: " in sentence and words in sentence
        assert output.count("error: ") == 1 and "Traceback" not in output
        assert raw.files_below(folder) == before

    return run


HEADER = b"id,ecg,ed,es"
MANIFESTS = {
    "empty": (b"", "needs a header and one row a subject"),
    "header alone": (HEADER, "needs a header and one row a subject"),
    "no ecg": (b"id,ed,es\n1,2,3", "has no column ecg"),
    "no images": (b"id,ecg\n1,2", "has neither columns ed and es nor a column cine"),
    "a column twice": (HEADER + b",age,age\n1,2,3,4,5,6", "names column age twice"),
    "latin-1": (HEADER + b"\nJos\xe9,2,3,4", "cannot be read"),
    "an open quote": (HEADER + b'\n1,"2,3,4\n5,6,7,8', "cannot be read"),
    "an endless cell": (HEADER + b'\n"' + b"x" * 200_000 + b'",2,3,4', "cannot be read"),
    "no usable row": (HEADER + b"\n1,e.xml,d.nii,s.nii", "e.xml: does not exist"),
    "ragged rows": (HEADER + b"\n1,2,3\n4,5,6,7,8", "line 2 has 3 cells, not 4"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_bad_manifest_makes_no_cohort(name, refused, tmp_path):
    content, words = MANIFESTS[name]
    (tmp_path / "m.csv").write_bytes(content)
    refused(words, tmp_path, "data.py", "prepare", "m.csv", "cohort")
    assert os.listdir(tmp_path) == ["m.csv"]


def edited(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def saved(array, save=np.save):
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


IMAGES = np.ones((3, *data.GRID), np.uint8)
COHORTS = {  # file, its content or a change of it (None: removed), words
    "no description": ("cohort.json", None, "is no cohort"),
    "description cut": ("cohort.json", lambda content: content[:40], "cohort.json: cannot be read"),
    "deep": ("cohort.json", b"[" * 99999, "cohort.json: cannot be read"),
    "source as text": ("cohort.json", edited(source="x"), "cohort.json: names no kind"),
    "grid as text": ("cohort.json", edited(grid="abc"), "and spacing [1, 'abc'"),
    "other grid": ("cohort.json", edited(grid=[8, 8, 8]), "and spacing [1, [8, 8, 8]"),
    "other spacing": ("cohort.json", edited(spacing_mm=[8, 2, 2]), "[8, 2, 2]], not [1, [12"),
    "first edition": ("cohort.json", edited(format_version=0), "spacing [0, [12"),
    "no array": ("es.npy", None, "es.npy: cannot be read"),
    "array cut": ("ecg.npy", lambda content: content[:-1], "ecg.npy: cannot be read"),
    "other type": ("ed.npy", saved(IMAGES.astype(float)), "ed.npy: is float64"),
    "other shape": ("ed.npy", saved(IMAGES[:, 1:]), "ed.npy: is uint8 (3, 11, 64, 64)"),
    "objects": ("ecg.npy", saved(np.array([{}] * 3)), "ecg.npy: cannot be read"),
    "a zip": ("ed.npy", saved(IMAGES, np.savez), "ed.npy: "),
    "no table": ("subjects.csv", None, "subjects.csv: does not exist"),
    "a row more": ("subjects.csv", lambda content: content + b"9,val,1\n", "not <i2 (4, 12, 2500)"),
    "other split": ("subjects.csv", lambda content: content + b"9,q,1\n", "has damaged rows"),
    "id twice": ("subjects.csv", lambda content: content + b"s0,val,1\n", "has damaged rows"),
}


@pytest.mark.parametrize("name", COHORTS)
def test_a_bad_cohort_folder_is_named_with_its_file(name, refused, tmp_path):
    file, content, words = COHORTS[name]
    data.write_cohort(tmp_path / "c", raw.random_subjects(3), ["x"], {"kind": "test"})
    path = tmp_path / "c" / file
    content = content(path.read_bytes()) if callable(content) else content
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(words, tmp_path, "data.py", "show", "c", "--subject", "s1")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


COMMANDS = [  # words of the sentence, command line in the folder `world`
    ("the following arguments are required", "data.py"),
    ("invalid choice: 'draw'", "data.py draw c"),
    ("manifest: must not be empty", "data.py check ''"),
    ("nowhere.csv: does not exist", "data.py check nowhere.csv"),
    ("taken: is a folder", "data.py check taken"),
    ("--workers: must be from 1", "data.py check m.csv --workers 0"),
    ("invalid choice: 55", "data.py check m.csv --mains 55"),
    ("cohort: must not be empty", "data.py prepare m.csv ''"),
    ("nowhere.csv: does not exist", "data.py prepare nowhere.csv new/folder"),
    ("taken: exists and is not replaced; delete it", "data.py prepare m.csv taken"),
    ("thesis.txt: exists and is not replaced", "data.py prepare m.csv taken/thesis.txt"),
    ("link: exists and is not replaced", "data.py prepare m.csv link"),
    ("/proc/c", "data.py prepare m.csv /proc/c"),
    ("c: has no subject nobody", "data.py show c --subject nobody"),
    ("taken: is no cohort", "data.py show taken --subject 1"),
    ("thesis.txt: exists and is no PNG", "data.py show c --subject 000001 --out taken/thesis.txt"),
    ("taken", "data.py show c --subject 000001 --out taken"),
    ("no/x.png", "data.py show c --subject 000001 --out no/x.png"),
    ("folder: must not be empty", "synthetic.py ''"),
    ("taken: exists and is not replaced", "synthetic.py taken --subjects 1"),
    ("taken: exists and is not replaced", "synthetic.py taken --raw --subjects 1"),
    ("--subjects: must be", "synthetic.py new --subjects 0"),
    ("must not be empty", "train.py --out x --data ''"),
    ("nowhere: does not exist", "train.py --out x --data nowhere"),
    ("taken: is no cohort", "train.py --out x --data taken"),
    ("--epochs: must be", "train.py --out x --data c --epochs 0"),
    ("invalid choice: 'mid'", "train.py --out x --data c --views mid"),
    ("--slices: must be from 1 to 12", "train.py --out x --data c --slices 13"),
    ("--weights: '3' is no PAIR=WEIGHT", "train.py --out x --data c --weights 3"),
    ("--weights: 'ed_es=-1' is no PAIR", "train.py --out x --data c --weights ed_es=-1"),
    ("--weights: 'ed_es=1' is no PAIR", "train.py --out x --data c --views ed --weights ed_es=1"),
    ("--batch-size: 44 must be", "train.py --out x --data c --batch-size 44"),
    ("--lr: must be", "train.py --out x --data c --lr nan"),
    ("--lr: made the loss infinite", "train.py --out x --data c --epochs 1 --lr 1e8 --limit 32"),
    ("--temperature: must be", "train.py --out x --data c --temperature 0"),
    ("--resume: contradicts --overwrite", "train.py --data c --resume --overwrite"),
    ("runs/dual: holds a run", "train.py --data c"),
    ("best: has no last.pt", "train.py --data c --resume --out best"),
    ("--seed was 0 and is 5", "train.py --data c --epochs 1 --resume --seed 5"),
    ("last.pt: cannot be read", "train.py --data c --resume --out cut"),
    ("last.pt: cannot be read", "train.py --data c --resume --out evil"),
    ("taken: holds no trained run", "evaluate.py taken"),
    ("best.pt: cannot be read", "evaluate.py cut"),
    ("best.pt: cannot be read", "evaluate.py evil"),
    ("must not be empty", "evaluate.py runs/dual --data ''"),
    ("--bootstrap: must be", "evaluate.py runs/dual --bootstrap 0"),
    ("--labels: 50.0 is neither", "evaluate.py runs/dual --labels 50.0"),
    ("--labels: 5 is neither all nor a number", "evaluate.py runs/dual --labels 5"),
    ("share a name", "evaluate.py runs/dual runs/dual"),
    ("nowhere.csv: does not exist", "evaluate.py runs/dual --predict nowhere.csv"),
    ("names no ECG that can be read", "evaluate.py runs/dual --predict m.csv"),
    ("predictions.csv: would be overwritten", "evaluate.py runs/dual --predict predictions.csv"),
]


@pytest.fixture(scope="module")
def world(cohort_folder, run_script, tmp_path_factory):
    """A cohort c, a run on it and damaged copies, manifests, and a folder with other things."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(cohort_folder, folder / "c")
    options = ("--epochs", 1, "--limit", 32, "--batch-size", 32)
    assert run_script("train.py", "--data", "c", *options, cwd=folder).returncode == 0
    best = (folder / "runs" / "dual" / "best.pt").read_bytes()
    contents = {"best": best, "cut": best[:5000], "evil": pickle.dumps(Evil(), protocol=2)}
    for name, content in contents.items():
        (folder / name).mkdir()
        for file in ("best.pt", "last.pt"):
            (folder / name / file).write_bytes(content)
    (folder / "best" / "last.pt").unlink()
    for name in ("m.csv", "predictions.csv"):
        (folder / name).write_text("id,ecg,ed,es\n1,nowhere.xml,d.nii,s.nii\n")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("precious")
    (folder / "link").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize(("words", "line"), COMMANDS)
def test_a_bad_command_line_is_refused(words, line, world, refused):
    refused(words, world, *shlex.split(line))
