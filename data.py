"""Data: raw ECG and CMR files become one cohort folder, which is read back in batches.

    python data.py check manifest.csv                       # validate every row, write nothing
    python data.py prepare manifest.csv cohort/             # raw files -> cohort folder
    python data.py show cohort/ --subject ID --out x.png    # one ECG beside ED and ES slices

The file follows the data: ECG files, CMR files, manifest, cohort folder, batches, commands. On a
first reading take "cohort folder" and "batches": training sees nothing else. Images are always
(Z, Y, X): slice, row, column; from base to apex where the file tells.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from warnings import catch_warnings

import nibabel
import numpy as np
import scipy.signal
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

# What a cohort holds of each subject
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SAMPLING_RATE_HZ = 250
SECONDS = 10
ECG_SHAPE = (len(LEADS), SECONDS * SAMPLING_RATE_HZ)
PHASES = ("ed", "es")
GRID = (12, 64, 64)  # voxels (Z, Y, X)
SPACING_MM = (10.0, 3.0, 3.0)  # the box, 120 x 192 x 192 mm, holds both ventricles
ARRAYS = {"ecg": ("<i2", ECG_SHAPE), **{phase: ("|u1", GRID) for phase in PHASES}}
COVARIATES = ("age", "sex", "bmi")
SPLITS = ("train", "val", "test")
FORMAT_VERSION = 1

# What files and cells may hold
LARGEST_ECG_MB = 20
LARGEST_IMAGE_MB = 450  # a cine of 512 x 512 x 14 x 30 in float32
MASK_ML = (20, 1500)  # volume of a labelled heart
PLAUSIBLE = {"age": (16, 110), "bmi": (12, 70), "LVM_g": (20, 500)}
PLAUSIBLE.update(dict.fromkeys(("LVEF_pct", "RVEF_pct"), (5, 90)))
PLAUSIBLE.update(dict.fromkeys(("LVEDV_ml", "LVESV_ml", "LVSV_ml"), (5, 800)))
PLAUSIBLE.update(dict.fromkeys(("RVEDV_ml", "RVESV_ml", "RVSV_ml"), (5, 800)))

# I and II give the other limb leads. Einthoven: III = II - I. Goldberger: aVR = -(I + II) / 2,
# aVL = I - II / 2, aVF = II - I / 2.
LIMB_LEADS = np.array([[-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]])

# Where slices, rows and columns of a short-axis stack point in the patient (right, anterior,
# superior): base to apex, anterior to inferior wall, septum to lateral wall.
SHORT_AXIS = np.array([[-0.61, 0.61, -0.51], [0.36, -0.36, -0.86], [-0.71, -0.71, 0.0]])
# |cosine| of a stack's slices with the first: at least 0.95 along a heart, at most 0.7 along the
# scanner's axes, which converters write where they know none.
LEAST_HEART_COSINE = 0.85


class InputError(Exception):
    """The user's input is wrong: where (file, row or argument), and which rule it breaks."""

    def __str__(self):
        where, rule = self.args
        return " ".join(f"{where}: {rule}".split())  # one line, whatever a damaged file holds


def require(condition, where, rule):
    """How a rule is checked: raises InputError unless the condition holds."""
    if not condition:
        raise InputError(where, rule)


def require_file(path, largest_mb):
    require(not os.path.isdir(path), path, "is a folder; name the file in it")
    require(os.path.isfile(path), path, "does not exist; correct the path")
    small = path.stat().st_size <= largest_mb * 1e6
    require(small, path, f"is larger than {largest_mb} MB, as no file of its kind is; check it")


@contextmanager
def reading(path):
    """Whatever a library raises while it reads `path` becomes an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:160]
        raise InputError(path, f"cannot be read ({reason}); export or copy it again") from None


def parse_number(text):
    """Text -> float; nan unless it is a finite number."""
    try:
        value = float(text.replace("_", "x"))  # Python would read 20209_2_0 as a number
    except (ValueError, AttributeError):
        return math.nan
    return value if math.isfinite(value) else math.nan


# ---------------------------------------------------------------- ECG files


def read_ecg(cells, folder, mains_hz=50):
    """Read and clean the ECG of a manifest row {column: text}: (int16 (12, 2500) µV, warnings).

    Raises InputError, which names the file and the rule that it breaks.
    """
    path = Path(folder) / cells["ecg"]
    reader = ECG_READERS.get(path.suffix.lower())
    require(reader, path, f"is none of {', '.join(ECG_READERS)}; convert it to one of them")
    require_file(path, LARGEST_ECG_MB)
    with reading(path):
        leads, rate_hz = reader(path, cells)
        names = [name.strip().lower() for name, _ in leads]
        ecg_mv = []
        for lead in LEADS:
            count = names.count(lead.lower())
            require(count == 1, path, f"holds lead {lead} {count} times, not once; export all 12")
            ecg_mv.append(leads[names.index(lead.lower())][1])
        ecg_mv = np.stack(ecg_mv)  # (12, T)
        return clean_ecg(ecg_mv, rate_hz, mains_hz, path)


def read_cardiosoft(path, cells):
    """GE CardioSoft XML (UK Biobank field 20205): the 10 s rhythm of StripData, no median beats.

    As every reader returns: (list of (lead name, samples (T,) in mV), rate in Hz).
    """
    content = path.read_bytes()
    has_entities = b"<!ENTITY" in content.replace(b"\0", b"")  # as UTF-16, too
    require(not has_entities, path, "declares XML entities, as no ECG export does; export it again")
    root = ElementTree.fromstring(content)
    strip = root.find(".//StripData")
    require(strip is not None, path, "has no StripData, the 10 s rhythm; export it with the rhythm")
    rate_hz = parse_number(strip.findtext("SampleRate"))
    step_uv = parse_number(strip.findtext("Resolution"))
    require(0.01 <= step_uv <= 100, path, "has no Resolution from 0.01 to 100 µV; export it again")
    leads = []
    for waveform in strip.findall("WaveformData"):
        text = waveform.text or "0"  # a further lead may be empty
        steps = np.array([int(step) for step in text.split(",")], np.int32)
        leads.append((waveform.get("lead", ""), steps * step_uv / 1000))
    return leads, rate_hz


# A signal's line in a WFDB header: a.mat 16+24 1000(0)/mV 16 0 -5 1234 0 aVR
SIGNAL_LINE = re.compile(
    r"""(?P<file>\S+)
    \s+ 16 (x1)? (:0)? (\+(?P<offset>\d{1,9}))?      # format 16, bytes before the samples
    \s+ (?P<gain>[-+.\deE]+) (\([-+]?\d+\))?         # steps per unit (step of 0: of no matter here)
    (/(?P<unit>\S+))?
    (\s+ \S+)? (\s+ \S+)? (\s+ \S+)?                # bits, middle, first sample; may lack from here
    (\s+ (?P<checksum>[-+]?\d+))?                    # sum of the samples in 16 bits
    (\s+ \S+)? (\s+ (?P<lead>.+))?""",  # block size, name
    re.VERBOSE,
)
UNITS_MV = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3}


def read_wfdb(path, cells):
    """WFDB header with format-16 signals in .dat or .mat (https://wfdb.io/spec/header-files.html)."""
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    _, signal_count, rate, length = lines[0].split()[:4]
    signals = [SIGNAL_LINE.fullmatch(line) for line in lines[1 : int(signal_count) + 1]]
    complete = 0 < len(signals) == int(signal_count) and all(signals)
    require(
        complete, path, f"has not {signal_count} signal lines of format 16 with a gain; convert it"
    )
    leads = []
    for file, group in groupby(signals, key=itemgetter("file")):
        group = list(group)
        samples_path = path.with_name(Path(file).name)  # never outside the header's folder
        samples = read_format_16(samples_path, group, int(length))  # (T, signals)
        for steps, header_line in zip(samples.T, group, strict=True):
            checksum = header_line["checksum"]
            intact = checksum is None or (steps.sum(dtype=int) - int(checksum)) % 2**16 == 0
            require(intact, samples_path, "differs from its checksum; copy the record again")
            leads.append((header_line["lead"] or "", to_millivolt(steps, header_line, path)))
    return leads, parse_number(re.split("[/(]", rate)[0])


def read_format_16(path, signals, length):
    """Samples int16 (T, signals) of the signals that share a file."""
    require_file(path, LARGEST_ECG_MB)
    offset = int(signals[0]["offset"] or 0)
    count = length * len(signals)
    complete = 0 < count and offset + 2 * count <= path.stat().st_size
    require(complete, path, f"ends before the {length} samples of its header; copy it again")
    return np.fromfile(path, "<i2", count, offset=offset).reshape(length, len(signals))


def to_millivolt(steps, header_line, path):
    unit_mv = UNITS_MV.get((header_line["unit"] or "mV").lower())
    require(unit_mv, path, f"unit '{header_line['unit']}' is none of mV, uV, V; correct the header")
    gain = parse_number(header_line["gain"])
    require(1e-6 < gain < 1e9, path, f"gain {header_line['gain']} is not positive; correct it")
    samples_mv = steps * (unit_mv / gain)
    samples_mv[steps == -32768] = np.nan  # the standard's mark of a missing sample
    return samples_mv


def read_npy(path, cells):
    """NumPy array (12, T) in mV, in the order of LEADS, at cells["ecg_hz"] (500 Hz where empty)."""
    ecg_mv = np.load(path, mmap_mode="r", allow_pickle=False)
    fits = ecg_mv.ndim == 2 and len(ecg_mv) == len(LEADS) and ecg_mv.dtype.kind in "iuf"
    require(fits, path, f"is {ecg_mv.dtype} {ecg_mv.shape}, not numbers (12, samples); convert it")
    rate_hz = parse_number(cells.get("ecg_hz") or "500")
    return list(zip(LEADS, np.array(ecg_mv, float), strict=True)), rate_hz


# Another format is one function and one entry here.
ECG_READERS = {".xml": read_cardiosoft, ".hea": read_wfdb, ".npy": read_npy}


def clean_ecg(ecg_mv, rate_hz, mains_hz=50, where="ECG"):
    """(12, T) mV at any rate -> (int16 (12, 2500) µV at 250 Hz, warnings), zero-phase filtered.

    High-pass 0.5 Hz against baseline wander, notch at mains_hz (0: none), the middle 10 s. There is
    no z-score: voltage carries the mass of the heart.
    """
    require(100 <= rate_hz <= 10_000, where, f"rate is {rate_hz:g} Hz; it must be 100 to 10,000")
    require(np.isfinite(ecg_mv).all(), where, "holds missing or non-finite samples; leave it out")
    seconds = (ecg_mv.shape[1] + 1) / rate_hz  # exports of 10 s may lack the last sample
    require(seconds >= SECONDS, where, f"lasts {seconds:.2f} s, but 10 s are needed; leave it out")
    cleaned_mv = filter_ecg(ecg_mv, rate_hz, mains_hz)  # (12, 2500)
    residual = require_heart_beats(cleaned_mv, where)
    warnings = ecg_warnings(ecg_mv, rate_hz, cleaned_mv, residual)
    return np.round(cleaned_mv * 1000).astype(np.int16), warnings


def filter_ecg(ecg_mv, rate_hz, mains_hz):
    """(12, T) mV -> the middle 10 s at 250 Hz, filtered forth and back: (12, 2500) mV."""
    ratio = Fraction(SAMPLING_RATE_HZ / rate_hz).limit_denominator(1000)
    ecg_mv = ecg_mv - np.median(ecg_mv, axis=1, keepdims=True)
    ecg_mv = scipy.signal.resample_poly(ecg_mv, ratio.numerator, ratio.denominator, axis=1)
    filters = design_filters(mains_hz)
    ecg_mv = scipy.signal.sosfiltfilt(filters, ecg_mv, axis=1, padlen=2 * SAMPLING_RATE_HZ)

    # Resampling may have lost the last sample.
    missing = max(0, ECG_SHAPE[1] - ecg_mv.shape[1])
    ecg_mv = np.pad(ecg_mv, ((0, 0), (0, missing)), mode="edge")
    start = (ecg_mv.shape[1] - ECG_SHAPE[1]) // 2
    return ecg_mv[:, start : start + ECG_SHAPE[1]]


@lru_cache
def design_filters(mains_hz):
    """Second-order sections: Butterworth high-pass of 0.5 Hz and, unless 0, a notch at mains_hz."""
    highpass = scipy.signal.butter(2, 0.5, "highpass", fs=SAMPLING_RATE_HZ, output="sos")
    if mains_hz == 0:
        return highpass
    notch = scipy.signal.iirnotch(mains_hz, 30, fs=SAMPLING_RATE_HZ)
    return np.concatenate([highpass, scipy.signal.tf2sos(*notch)])


def require_heart_beats(ecg_mv, where):
    """Refuse ECGs (12, 2500) mV that no heart gives; the residual of the limb leads, in 0..1."""
    flat = [name for name, lead in zip(LEADS, ecg_mv, strict=True) if np.ptp(lead) < 0.01]
    require(not flat, where, f"lead {', '.join(flat)} is flat (below 0.01 mV); leave it out")
    peak_mv = np.abs(ecg_mv).max()
    rule = f"reaches {peak_mv:.0f} mV, as no heart does; check gain and unit"
    require(peak_mv <= 20, where, rule)
    errors = ecg_mv[2:6] - LIMB_LEADS @ ecg_mv[:2]  # III, aVR, aVL, aVF minus what I and II tell
    largest_rms = np.sqrt(np.square(errors).mean(axis=1)).max()
    residual = largest_rms / np.sqrt(np.square(ecg_mv[:6]).mean())
    rule = (
        f"limb leads contradict Einthoven and Goldberger by {residual:.0%}; were leads exchanged?"
    )
    require(residual <= 0.2, where, rule)
    return residual


def ecg_warnings(stored_mv, rate_hz, ecg_mv, residual):
    """What is rare in an ECG: as stored (12, T), cleaned (12, 2500), its limb-lead residual."""
    warnings = []
    stride = int(rate_hz / 100)  # a sample each 10 ms or less is enough
    sparse_mv = stored_mv[:, ::stride]
    window = round(2 * rate_hz / stride)  # in 2 s every heart beats
    highest = ndimage.maximum_filter1d(sparse_mv, window, axis=1)
    lowest = ndimage.minimum_filter1d(sparse_mv, window, axis=1)
    still = [name for name, span in zip(LEADS, highest - lowest, strict=True) if span.min() < 0.01]
    if still:
        warnings.append(f"a lead is flat for 2 s, as of a loose electrode: {' '.join(still)}")
    if residual > 0.05:
        warnings.append("limb leads agree only roughly with Einthoven and Goldberger")
    if np.abs(ecg_mv).max() > 6 or np.ptp(ecg_mv, axis=1).max() < 0.3:
        warnings.append("ECG amplitude is outside the usual 0.3 to 6 mV")
    power = np.square(np.abs(np.fft.rfft(ecg_mv, axis=1))).sum(axis=0)
    peak = power.argmax()
    near_peak = power[max(0, peak - 2) : peak + 3].sum()
    if near_peak > 0.9 * power.sum():
        warnings.append("ECG is one sine wave, as of mains or a test signal")
    return warnings


# ---------------------------------------------------------------- CMR files


@dataclass
class Scan:
    """The phases of one heart on one grid."""

    phases: dict  # {"ed", "es": float32 (Z, Y, X) in scanner units}
    spacing_mm: np.ndarray  # (3,) between slices, rows, columns
    mask: np.ndarray | None = None  # bool (Z, Y, X), the heart at ED
    warnings: list = field(default_factory=list)


@dataclass
class Stack:
    """A NIfTI file with its axes turned to (Z, Y, X[, T])."""

    voxels: np.ndarray  # float32
    spacing_mm: np.ndarray  # (3,)
    affine: np.ndarray | None  # (4, 4), (z, y, x) voxel -> mm; None where the header has none
    orientation: np.ndarray  # how the stored axes were turned, see stack_orientation
    follows_heart: bool  # whether the affine tells base, anterior wall and septum


def read_scan(cells, folder):
    """The CMR of a manifest row {column: text}: Scan. A cine takes precedence over ed and es."""
    folder = Path(folder)
    if cells.get("cine"):
        ed_path = es_path = folder / cells["cine"]
        stack, es, warnings = read_cine(ed_path, cells)
    else:
        ed_path = folder / cells["ed"]
        es_path = folder / cells["es"]
        stack = read_stack(ed_path)
        es = onto_grid(read_stack(es_path, reference=stack), stack, es_path, order=1)
        warnings = []
    ed = stack.voxels
    require_contrast(ed_path, ed)
    require_contrast(es_path, es)
    if not stack.follows_heart:
        warnings.append("no affine along a heart, axes stay as stored: look with data.py show")
    mm = stack.spacing_mm
    motion = motion_map(ed, es, mm)
    require(motion.max() > 0, es_path, "ED and ES are one image; name two phases")
    if not (4 <= mm[0] <= 15 and 0.5 <= mm[1] <= 4 and 0.5 <= mm[2] <= 4):
        warnings.append("voxel spacing is unusual (4-15 mm of slices, 0.5-4 mm in plane expected)")
    mask = None
    if cells.get("mask"):
        mask = read_mask(folder / cells["mask"], stack, motion)
    return Scan({"ed": ed, "es": es}, mm, mask, warnings)


def require_contrast(path, voxels):
    require(np.ptp(voxels) > 0, path, "is one constant grey level; convert it again")


def read_cine(path, cells):
    """ED and ES of a 4D NIfTI by ed_frame (0) and es_frame (estimated): (Stack, ES, warnings)."""
    stack = read_stack(path, dimensions=4)
    frames = stack.voxels  # (Z, Y, X, T)
    stack.voxels = frames[..., frame_number(path, cells, "ed_frame", frames) or 0]
    es_frame = frame_number(path, cells, "es_frame", frames)
    if es_frame is not None:
        return stack, frames[..., es_frame], []
    require_contrast(path, frames)
    # ES is the frame with the least blood, which is bright, where the cine moves.
    box = motion_box(frames.max(axis=3), frames.min(axis=3), stack.spacing_mm)
    is_blood = frames[box] > np.percentile(stack.voxels, [1, 99]).mean()
    es_frame = is_blood.sum(axis=(0, 1, 2)).argmin()
    return stack, frames[..., es_frame], ["ES frame was estimated from the images"]


def frame_number(path, cells, column, frames):
    """Cell -> int, or None where it is empty; "17.0" is what pandas makes of a column with gaps."""
    cell = cells.get(column)
    if not cell:
        return None
    count = frames.shape[3]
    rule = f"{column} '{cell}' is no frame number from 0 to {count - 1}; correct the manifest"
    require(parse_number(cell) in range(count), path, rule)
    return int(parse_number(cell))


def read_stack(path, dimensions=3, reference=None):
    """Read a short-axis NIfTI file: Stack.

    reference: the Stack of another file of this heart, whose order of axes this one takes over
    unless both have an affine.
    """
    require_file(path, LARGEST_IMAGE_MB)
    with reading(path):
        image = load_nifti(path)
        rule = f"is {image.ndim}D {image.shape}, but {dimensions}D is needed; see the columns"
        require(image.ndim == dimensions, path, rule)
        stored_mm = np.array(image.header.get_zooms()[:3], float)
        affine = image.affine if affine_is_valid(image, stored_mm) else None
        if reference is not None and (affine is None or reference.affine is None):
            affine = None  # one alone places nothing: both files are taken to be stored alike
            orientation = reference.orientation
            follows_heart = reference.follows_heart
        else:
            orientation, follows_heart = stack_orientation(stored_mm, affine)
        turned = image.as_reoriented(orientation)
        voxels = turned.get_fdata(caching="unchanged", dtype=np.float32)  # (Z, Y, X[, T])
    # The header's spacing in the new order; nibabel would take it from the affine.
    spacing_mm = stored_mm[np.argsort(orientation[:, 0])]
    require_heart_size(path, voxels, spacing_mm)
    turned_affine = None if affine is None else turned.affine
    voxels = np.ascontiguousarray(voxels)
    return Stack(voxels, spacing_mm, turned_affine, orientation, follows_heart)


def require_heart_size(path, voxels, spacing_mm):
    """Refuse (Z, Y, X[, T]) that cannot show a heart: absurd grey levels, or too small."""
    plausible = -1e9 < voxels.min() and voxels.max() < 1e9  # false for NaN
    require(plausible, path, "holds NaN, infinite or absurd voxels; convert it again")
    extent_mm = voxels.shape[:3] * spacing_mm
    has_pixels = len(voxels) >= 3 and min(voxels.shape[1:3]) >= 16
    has_size = extent_mm[0] >= 25 and extent_mm[1:].min() >= 80
    size = f"{voxels.shape[:3]} voxels (Z, Y, X) of {spacing_mm.round(2).tolist()} mm"
    rule = f"has {size}, too little for a heart; correct the spacing or the file"
    require(has_pixels and has_size, path, rule)


def load_nifti(path):
    """A nibabel image, read to the end of the file: only then is a .gz's checksum verified."""
    largest = int(LARGEST_IMAGE_MB * 1e6)  # bytes
    too_large = f"unpacks to over {LARGEST_IMAGE_MB} MB; crop it"
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read(largest + 1)
    require(len(content) <= largest, path, too_large)

    # The header as written: nibabel would repair a spacing of 0.
    is_nifti2 = content[4:7] == b"n+2"
    require(is_nifti2 or content[344:347] == b"n+1", path, "is no NIfTI file; convert it")
    image_class = nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image
    header_size = image_class.header_class.template_dtype.itemsize
    header = image_class.header_class(content[:header_size], check=False)
    spacing_mm = header["pixdim"][1:4]
    valid = np.isfinite(spacing_mm).all() and (spacing_mm > 0).all()
    require(valid, path, f"voxel spacing {spacing_mm.tolist()} mm is not positive; correct it")

    # What the header promises must be there.
    image = nibabel.squeeze_image(image_class.from_bytes(content))
    dtype = image.get_data_dtype()
    require(dtype.kind in "iuf", path, f"holds {dtype} voxels, not grey levels; convert it again")
    voxels = math.prod(image.shape)
    whole = 0 < voxels * dtype.itemsize <= len(content)
    require(whole, path, f"announces {image.shape} voxels but holds fewer; copy it again")
    require(4 * voxels <= largest, path, too_large)  # float32 takes 4 bytes
    return image


def affine_is_valid(image, spacing_mm):
    """Whether the header sets an affine, and it agrees with the voxel spacing."""
    is_set = image.header["sform_code"] > 0 or image.header["qform_code"] > 0
    directions = image.affine[:3, :3] / spacing_mm
    return is_set and np.allclose(directions.T @ directions, np.eye(3), atol=0.04)


def stack_orientation(spacing_mm, affine):
    """How to turn stored axes to (Z, Y, X): (orientation, whether it follows the heart).

    orientation (3, 2), as nibabel writes it: for each stored axis, its place among (Z, Y, X), and
    -1 where it is flipped. Slices run along the thickest voxels. If the affine's slices run along a
    heart, it tells rows from columns and all directions; else (or None) axes stay as stored.
    """
    slice_axis = int(np.flatnonzero(spacing_mm > 0.999 * spacing_mm.max())[-1])  # last of equals
    if affine is not None:
        to_heart = np.eye(4)
        to_heart[:3, :3] = SHORT_AXIS @ affine[:3, :3]  # stored axes -> directions of the heart
        if abs(to_heart[0, slice_axis]) >= LEAST_HEART_COSINE * spacing_mm[slice_axis]:
            return nibabel.io_orientation(to_heart), True
    column_axis, row_axis = [axis for axis in range(3) if axis != slice_axis]  # x before y
    places = np.argsort([slice_axis, row_axis, column_axis])
    return np.column_stack([places, np.ones(3)]), False


def require_same(path, name, mine, other):
    rule = f"its {name} {tuple(mine)} is not ED's {tuple(other)}, and no affines place both"
    require(np.allclose(mine, other, rtol=1e-3), path, f"{rule}; resample one of them")


def onto_grid(stack, reference, path, order):
    """Voxels of a stack on the grid of another, by their affines. order 0: nearest, 1: linear."""
    if stack.affine is None or reference.affine is None:
        require_same(path, "grid", stack.voxels.shape, reference.voxels.shape)
        require_same(path, "spacing", stack.spacing_mm.tolist(), reference.spacing_mm.tolist())
        return stack.voxels
    shape = reference.voxels.shape
    if stack.voxels.shape == shape and np.allclose(stack.affine, reference.affine, atol=0.1):
        return stack.voxels
    to_stack = np.linalg.inv(stack.affine) @ reference.affine  # voxel of reference -> of stack
    options = {"output_shape": shape, "mode": "grid-constant"}
    covered = ndimage.affine_transform(np.ones_like(stack.voxels), to_stack, order=1, **options)
    possible = min(math.prod(shape), stack.voxels.size / abs(np.linalg.det(to_stack)))
    share = covered.sum() / possible
    require(share > 0.5, path, f"meets {share:.0%} of ED by its affine; correct one of the headers")
    return ndimage.affine_transform(stack.voxels, to_stack, order=order, **options)


def read_mask(path, stack, motion):
    """A label map of the heart at ED, 0 is background -> bool (Z, Y, X) on the grid of ED.

    motion: how much each place moves (Y, X), which must overlap.
    """
    mask = onto_grid(read_stack(path, reference=stack), stack, path, order=0) > 0
    volume_ml = mask.sum() * stack.spacing_mm.prod() / 1000
    rule = f"labels {volume_ml:.0f} ml, not {MASK_ML[0]} to {MASK_ML[1]} ml as a heart has"
    require(MASK_ML[0] <= volume_ml <= MASK_ML[1], path, f"{rule}; segment it or empty the cell")
    moves = motion[mask.any(axis=0)].max() > 0.3 * motion.max()
    require(moves, path, "labels what does not move; use the label map of this heart at ED")
    return mask


def motion_map(ed, es, spacing_mm):
    """How much each place in plane moves (Y, X).

    |ED - ES| averaged over the slices that both phases have, smoothed 6 mm, weighted by a 70 mm
    prior on the middle of the image.
    """
    shared = has_content(ed) & has_content(es)
    if not shared.any():
        shared[:] = True
    motion = np.abs(ed - es)[shared].mean(axis=0)  # (Y, X)
    motion = ndimage.gaussian_filter(motion, 6 / spacing_mm[1:])
    y = (np.arange(ed.shape[1]) - (ed.shape[1] - 1) / 2) * spacing_mm[1]
    x = (np.arange(ed.shape[2]) - (ed.shape[2] - 1) / 2) * spacing_mm[2]
    return motion * np.exp(-(y[:, None] ** 2 + x**2) / (2 * 70**2))


def has_content(volume):
    """Which slices (Z,) hold an image."""
    return np.ptp(volume, axis=(1, 2)) > 0


def motion_box(ed, es, spacing_mm):
    """Bounding box (three slices) of the beating heart.

    In plane: where motion is above 0.3 of its peak, the component that holds the peak. Along z: all
    slices with an image in either phase.
    """
    motion = motion_map(ed, es, spacing_mm)
    labels, _ = ndimage.label(motion >= 0.3 * motion.max())
    peak_label = labels[np.unravel_index(motion.argmax(), motion.shape)]
    y, x = ndimage.find_objects(labels)[peak_label - 1]
    filled = np.flatnonzero(has_content(ed) | has_content(es))
    return slice(filled[0], filled[-1] + 1), y, x


def crop_heart(scan, where="scan"):
    """Scan -> ({"ed", "es": uint8 GRID}, warnings).

    One box in millimetres and one intensity window for both phases, so that place, size and
    brightness stay comparable. Raises InputError.
    """
    ed = scan.phases["ed"]
    es = scan.phases["es"]
    if scan.mask is None:
        box = motion_box(ed, es, scan.spacing_mm)
    else:
        box = ndimage.find_objects(scan.mask.astype(int))[0]

    # Resample around the middle of the box. The first sample lies on a stored voxel, so that a
    # stack that has the grid's spacing is cropped without blur.
    first = np.array([axis.start for axis in box])
    last = np.array([axis.stop - 1 for axis in box])
    stride = np.array(SPACING_MM) / scan.spacing_mm  # stored voxels between samples
    origin = np.round((first + last) / 2 - (np.array(GRID) - 1) / 2 * stride)
    cropped = {name: resample(volume, origin, stride) for name, volume in scan.phases.items()}

    # One window, from the part of the grid that the stack covers.
    covered = covered_part(ed.shape, origin, stride)
    greys = np.stack([volume[covered] for volume in cropped.values()])
    low, high = np.percentile(greys, [1, 99])
    require(high > low, where, "shows one grey level around the heart; check the image or its mask")
    arrays = {}
    for phase, volume in cropped.items():
        scaled = (volume - low) / (high - low)
        arrays[phase] = np.round(scaled.clip(0, 1) * 255).astype(np.uint8)

    # Warn where the box or the order of phases looks wrong.
    warnings = list(scan.warnings)
    size_mm = (last - first) * scan.spacing_mm  # between the middles of outer voxels
    room_mm = np.multiply(GRID, SPACING_MM)
    if size_mm[0] > room_mm[0] - scan.spacing_mm[0] / 2:
        warnings.append("the stack is taller than the box, slices at its ends are cut")
    if (size_mm[1:] > 0.9 * room_mm[1:]).any():
        warnings.append("the heart touches the border of the box")
    middle = (low + high) / 2
    if (es[box] > middle).sum() > (ed[box] > middle).sum():  # bright voxels: blood
        warnings.append("ES seems to hold more blood than ED, are they exchanged?")
    return arrays, warnings


def covered_part(shape, origin, stride):
    """The samples of GRID that lie inside a stack of this shape: three slices."""
    begin = np.maximum(0, np.ceil(-origin / stride)).astype(int)
    last = np.floor((np.array(shape) - 1 - origin) / stride).astype(int)
    end = np.minimum(GRID, last + 1)
    return tuple(map(slice, begin, end))


def resample(volume, origin, stride):
    """(Z, Y, X) -> float32 GRID: sample k of an axis lies at stored voxel origin + k stride.

    Where the grid is coarser, a Gaussian first removes what it cannot show; outside is zero.
    """
    sigma = np.maximum(0, stride - 1) / 2  # in stored voxels
    volume = ndimage.gaussian_filter(volume, sigma, mode="nearest", truncate=3)
    on_voxels = (stride == stride.round()).all()  # then nearest is exact, and three times as fast
    order = 0 if on_voxels else 1
    return ndimage.affine_transform(volume, stride, origin, GRID, order=order, mode="grid-constant")


# ---------------------------------------------------------------- manifest

FILE_COLUMNS = ("ecg", "ed", "es", "cine", "mask")
READER_COLUMNS = ("ecg_hz", "ed_frame", "es_frame")  # what readers need beside files


@dataclass
class Row:
    """A row of a table, and the rule that it breaks, so that the others can go on."""

    cells: dict  # {column: text}
    line: int  # in the file
    problem: str = ""  # a sentence; "" for a good row


@dataclass
class Subject:
    """One row on its way into a cohort: its arrays, or the reason why it is rejected."""

    cells: dict  # id, split and the columns as text
    arrays: dict = field(default_factory=dict)  # as in ARRAYS
    warnings: list = field(default_factory=list)
    reason: str = ""


def is_text(cell):
    return cell != "" and math.isnan(parse_number(cell))


def read_table(path, required):
    """Read a CSV with a header (comma or ';', UTF-8, BOM allowed): list of Row.

    Raises InputError where the header does not fit, or no row follows it.
    """
    path = Path(path)
    require_file(path, LARGEST_IMAGE_MB)
    with reading(path):
        text = path.read_bytes().decode("utf-8-sig")
        header = text.split("\n", 1)[0]
        delimiter = ";" if header.count(";") > header.count(",") else ","
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, cells) for cells in reader if any(cells)]
    require(len(lines) > 1, path, "needs a header and one row a subject; add them")
    columns = [name.strip() for name in lines[0][1]]
    header = f"its header is {','.join(columns)[:200]}"
    missing = [name for name in required if name not in columns]
    require(not missing, path, f"has no column {', '.join(missing)}; {header}; add it")
    repeated = [name for name, count in Counter(columns).items() if name and count > 1]
    require(not repeated, path, f"names column {', '.join(repeated)} twice; {header}; rename one")
    rows = []
    first_line = {}  # of each id
    for line, texts in lines[1:]:
        texts = [text.strip() for text in texts]
        texts = ["" if text.lower() == "nan" else text for text in texts]  # as pandas writes it
        cells = dict.fromkeys(columns, "")
        cells.update(zip(columns, texts, strict=False))
        row = Row(cells, line)
        if len(texts) != len(columns):
            row.problem = f"line {line} has {len(texts)} cells, not {len(columns)}; correct it"
        elif not cells["id"]:
            row.problem = f"line {line} has an empty id; give each subject one"
        elif cells["id"] in first_line:
            row.problem = f"id stands in line {first_line[cells['id']]} already; keep one row"
        first_line.setdefault(cells["id"], line)
        rows.append(row)
    return rows


def read_manifest(path):
    """Read a manifest: (list of Row, names of its numeric columns). Raises InputError.

    A column is numeric when most of its filled cells are numbers; others are ignored, and said so.
    """
    rows = read_table(path, required=("id", "ecg"))
    header = rows[0].cells
    has_images = "cine" in header or ("ed" in header and "es" in header)
    require(has_images, path, "has neither columns ed and es nor a column cine; add them")
    special = ("id", "split", *FILE_COLUMNS, *READER_COLUMNS)
    columns = []
    for name in [name for name in header if name not in special]:
        filled = [row for row in rows if row.cells[name]]
        numeric = [row for row in filled if not is_text(row.cells[name])]
        if name in COVARIATES or (name and 2 * len(numeric) > len(filled)):
            columns.append(name)
        else:
            lines = [row.line for row in numeric[:3]]
            exception = f" but in lines {lines}" if lines else ""
            print(f"column {name or '(unnamed)'} is ignored: it holds no numbers{exception}")
    for row in rows:
        row.problem = row.problem or manifest_problem(row, columns)
        row.cells["split"] = row.cells.get("split") or split_of(row.cells["id"])
    return rows, columns


def manifest_problem(row, columns):
    """The first rule of manifests that a row breaks, as a sentence; "" for a good row."""
    cells = row.cells
    for name in columns:
        if is_text(cells[name]):
            return f"line {row.line}: {name} '{cells[name]}' is no number; correct or empty it"
    if cells.get("sex") and parse_number(cells["sex"]) not in (0, 1):
        return f"line {row.line}: sex '{cells['sex']}' must be 0 (female) or 1 (male)"
    if cells.get("split", "") not in ("", *SPLITS):
        return f"line {row.line}: split '{cells['split']}' must be train, val or test"
    if not cells["ecg"] or not (cells.get("cine") or (cells.get("ed") and cells.get("es"))):
        return f"line {row.line}: names no ECG or no pair of ED and ES (or cine); fill it in"
    return ""


def split_of(subject_id):
    """70/15/15 train, val, test by a hash of the id: no other row can move a subject."""
    place = int.from_bytes(hashlib.sha256(subject_id.encode()).digest()[:4], "big") / 2**32
    return SPLITS[np.searchsorted([0.70, 0.85], place, side="right")]


def prepare_row(manifest_path, mains_hz, row):
    """One Row of a manifest -> Subject. Never raises, as the other rows must go on."""
    folder = Path(manifest_path).parent
    cells = row.cells
    try:
        require(not row.problem, manifest_path, row.problem)
        ecg, ecg_warnings = read_ecg(cells, folder, mains_hz)
        scan = read_scan(cells, folder)
        images, cmr_warnings = crop_heart(scan, cells.get("cine") or cells["ed"])
    except InputError as error:
        return Subject(cells, reason=str(error))
    except Exception as error:  # a file that breaks a library in a new way
        reason = f"{type(error).__name__}: {error}; check the files of this row"
        return Subject(cells, reason=reason)
    warnings = [*ecg_warnings, *cmr_warnings, *implausible_values(cells)]
    return Subject(cells, {"ecg": ecg, **images}, warnings)


def implausible_values(cells):
    """Warnings about covariates and phenotypes that no adult has or that contradict one another."""
    warnings = []
    for name, (low, high) in PLAUSIBLE.items():
        value = parse_number(cells.get(name))  # nan where missing, which compares as false
        if value < low or value > high:
            warnings.append(f"{name} is implausible (outside {low} to {high})")
    for side in ("LV", "RV"):
        names = (f"{side}EDV_ml", f"{side}ESV_ml", f"{side}EF_pct")
        edv, esv, ef = [parse_number(cells.get(name)) for name in names]
        if edv > 0 and abs(ef - 100 * (edv - esv) / edv) > 3:
            warnings.append(f"{names[2]} is not 100 ({names[0]} - {names[1]}) / {names[0]}")
    return warnings


def run_parallel(function, tasks, workers=None, label="preparing"):
    """Yield function(task) in order, from several processes, with progress on stderr."""
    started = time.time()
    shown = 0.0
    workers = min(workers or os.cpu_count(), os.cpu_count(), max(1, len(tasks)))
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        for count, result in enumerate(pool.map(function, tasks, chunksize=4), start=1):
            yield result
            now = time.time()
            if now - shown > 5 or count == len(tasks):
                shown = now
                rate = count / (now - started)
                text = f"{label}: {count}/{len(tasks)} subjects, {rate:.0f}/s"
                left = (len(tasks) - count) / rate
                print(f"{text}, {left:.0f} s left", file=sys.stderr, flush=True)
    except BrokenProcessPool:
        rule = "a process was killed, most likely for lack of memory; use fewer processes"
        raise InputError("--workers", rule) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends with it should that be killed."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


# ---------------------------------------------------------------- cohort folder


@dataclass
class Report:
    """What became of the rows."""

    usable: list = field(default_factory=list)  # cells of the usable rows
    rejected: list = field(default_factory=list)  # of {"id", "reason"}
    warnings: list = field(default_factory=list)  # of {"id", "warning"}
    first_cells: dict = field(default_factory=dict)  # by the digest of an array

    def add(self, subject):
        cells = subject.cells
        if subject.reason:
            self.rejected.append({"id": cells["id"], "reason": subject.reason})
            return
        self.usable.append(cells)
        texts = list(subject.warnings)
        for name in ("ecg", "ed"):
            digest = hashlib.sha256(subject.arrays[name].tobytes()).digest()
            first = self.first_cells.setdefault(digest, cells)
            if first["split"] != cells["split"]:
                texts.append(f"LEAK between splits, same {name} array as in row: {first['id']}")
            elif first is not cells:
                texts.append(f"same {name} array as in row: {first['id']}")
        self.warnings += [{"id": cells["id"], "warning": text} for text in texts]

    def print(self, name):
        """Each rejected row, each kind of warning with three ids, and the number of good rows."""
        for entry in self.rejected[:20]:
            print(f"rejected {entry['id']}: {entry['reason']}")
        if len(self.rejected) > 20:
            print(f"and {len(self.rejected) - 20} more rejected rows")
        ids_by_kind = {}
        for entry in self.warnings:
            kind = entry["warning"].split(":")[0]
            ids_by_kind.setdefault(kind, []).append(entry["id"])
        for kind, ids in sorted(ids_by_kind.items()):
            more = ", …" if len(ids) > 3 else ""
            print(f"warning: {kind} ({len(ids)} subjects: {', '.join(ids[:3])}{more})")
        splits = Counter(cells["split"] for cells in self.usable)
        for split in SPLITS:
            if not splits[split]:
                print(f"warning: no subject is left for {split}; see the column split")
        total = len(self.usable) + len(self.rejected)
        print(f"{name}: {len(self.usable)} of {total} rows are usable")


def write_cohort(folder, subjects, columns, source):
    """Write subjects as they come, so that memory does not grow with their number: Report.

    The folder appears under its name when all in it is written; one that exists is not replaced.
    Raises InputError when it exists or no row is usable.
    """
    report = Report()
    with new_folder(Path(folder)) as aside:
        files = {name: open(aside / f"{name}.npy", "wb") for name in ARRAYS}
        write_headers(files, count=0)
        digest = hashlib.sha256()  # of the arrays: part of the cohort's fingerprint
        for subject in subjects:
            report.add(subject)
            assert subject.reason or set(subject.arrays) == set(ARRAYS), "a reader lacks a phase"
            for name, array in subject.arrays.items():
                content = array.tobytes()
                files[name].write(content)
                digest.update(content)
        write_headers(files, count=len(report.usable))
        for file in files.values():
            file.close()
        example = report.rejected[0]["reason"] if report.rejected else "there are none"
        require(report.usable, folder, f"is not made, as no row is usable, for example: {example}")
        write_csv(aside / "subjects.csv", ["id", "split", *columns], report.usable)
        write_csv(aside / "rejected.csv", ["id", "reason"], report.rejected)
        write_csv(aside / "warnings.csv", ["id", "warning"], report.warnings)
        description = {
            "format_version": FORMAT_VERSION,
            "source": source,
            "grid": GRID,
            "spacing_mm": SPACING_MM,
            "sha256": digest.hexdigest(),
        }
        (aside / "cohort.json").write_text(json.dumps(description, indent=1))
    return report


def write_headers(files, count):
    """Write the .npy headers for `count` subjects; numpy leaves room for the number to grow."""
    for name, file in files.items():
        dtype, shape = ARRAYS[name]
        header = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)


def require_new(path):
    rule = "exists and is not replaced; delete it or choose another name"
    require(not os.path.lexists(path), path, rule)


@contextmanager
def new_folder(folder):
    """Give a folder aside that is renamed to `folder` at the end, or removed if anything fails."""
    require_new(folder)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        yield aside
        require_new(folder)  # another process may have made it meanwhile
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_csv(path, columns, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def atomic_write(path, save):
    """Call save(binary file) aside, then rename: no name ever holds half a file."""
    aside = Path(f"{path}.partial")
    with open(aside, "wb") as file:
        save(file)
    aside.replace(path)


def load_checkpoint(path):
    """What torch.save wrote: tensors and built-ins alone, so that no foreign code can run."""
    with reading(path), catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass
class Cohort:
    """All of a cohort folder but its arrays, which stay on disk."""

    folder: Path
    ids: np.ndarray  # (N,) text
    split: np.ndarray  # (N,) train, val or test
    columns: dict  # {name: (N,) float, nan where missing}
    phenotypes: list  # names of columns
    outcomes: list  # columns of 0 and 1
    covariates: list
    source: dict  # {"kind": "synthetic" or "manifest", …}
    fingerprint: str  # changes with the subjects, their columns and arrays

    def indices(self, split):
        """Positions (n,) of the subjects of a split in the arrays."""
        return np.flatnonzero(self.split == split)


def open_cohort(folder):
    """Check a cohort folder and read its table: Cohort. Raises InputError."""
    folder = Path(folder)
    json_path = folder / "cohort.json"
    table_path = folder / "subjects.csv"
    require(json_path.is_file(), folder, "is no cohort (has no cohort.json); see data.py prepare")
    with reading(json_path):
        description = json.loads(json_path.read_text())
        made_with = [description[key] for key in ("format_version", "grid", "spacing_mm")]
        source = description["source"]
        require("kind" in source, json_path, "names no kind of source; prepare the cohort again")
    needed = [FORMAT_VERSION, list(GRID), list(SPACING_MM)]
    rule = f"has format, grid and spacing {made_with}, not {needed}; prepare it again"
    require(made_with == needed, folder, rule)

    # The table must be whole, as the arrays go by its order.
    rows = read_table(table_path, required=("id", "split"))
    damaged = [row for row in rows if row.problem or row.cells["split"] not in SPLITS]
    require(not damaged, table_path, "has damaged rows; prepare the cohort again")
    subjects = [row.cells for row in rows]
    names = [name for name in subjects[0] if name not in ("id", "split")]
    for name, (dtype, shape) in ARRAYS.items():
        path = folder / f"{name}.npy"
        with reading(path):
            array = np.lib.format.open_memmap(path, mode="r")
        fits = array.dtype == dtype and array.shape == (len(rows), *shape)
        rule = f"is {array.dtype} {array.shape}, not {dtype} {(len(rows), *shape)}; prepare again"
        require(fits and array.flags.c_contiguous, path, rule)

    columns = {name: np.array([parse_number(row[name]) for row in subjects]) for name in names}
    filled = [name for name in names if np.isfinite(columns[name]).any()]
    targets = [name for name in filled if name not in COVARIATES]
    is_binary = {name: set(columns[name][np.isfinite(columns[name])]) <= {0, 1} for name in targets}
    return Cohort(
        folder=folder,
        ids=np.array([row["id"] for row in subjects]),
        split=np.array([row["split"] for row in subjects]),
        columns=columns,
        phenotypes=[name for name in targets if not is_binary[name]],
        outcomes=[name for name in targets if is_binary[name]],
        covariates=[name for name in COVARIATES if name in filled],
        source=source,
        fingerprint=hashlib.sha256(json_path.read_bytes() + table_path.read_bytes()).hexdigest(),
    )


def find_cohort(path):
    """What --data names, opened: a cohort folder, or a manifest, which is prepared once.

    A manifest is prepared into cohorts/ with a 50 Hz notch, and anew when it or its files change;
    of WFDB, the header and samples of its name.
    """
    path = Path(path)
    if path.is_dir():
        return open_cohort(path)
    rows = read_table(path, required=("id", "ecg"))
    digest = hashlib.sha256(str((FORMAT_VERSION, path.resolve(), GRID, SPACING_MM, rows)).encode())
    for row in rows:
        for file in files_of(row.cells, path.parent):
            digest.update(str(os.stat(file).st_mtime_ns).encode())
    folder = Path("cohorts") / f"{path.stem}-{digest.hexdigest()[:8]}"
    if not folder.exists():
        prepare(path, folder)
    return open_cohort(folder)


def files_of(cells, folder):
    """The files that a manifest row names, samples beside a WFDB header included, if they exist."""
    files = []
    for name in [cells[column] for column in FILE_COLUMNS if cells.get(column)]:
        stem, ending = os.path.splitext(folder / name)
        files.append(stem + ending)
        if ending.lower() == ".hea":
            files += [stem + ".dat", stem + ".mat"]
    return [file for file in files if os.path.isfile(file)]  # false for impossible names, too


# ---------------------------------------------------------------- batches


class CohortDataset(Dataset):
    """Batches of a cohort as they are stored: dataset[epoch, indices].

    Gives {"ecg": int16 (B, 12, 2500) µV, "ed", "es": uint8 (B, Z, Y, X), "indices" (B,), "epoch"}.
    ecg_indices (N,): whose ECG stands beside each heart, for the negative control.
    """

    def __init__(self, cohort, names=tuple(ARRAYS), ecg_indices=None):
        self.folder = cohort.folder
        self.names = names
        self.ecg_indices = ecg_indices

    def __getitem__(self, key):
        epoch, indices = key
        stored = {"epoch": epoch, "indices": torch.as_tensor(indices)}
        for name in self.names:
            # Opened anew for every batch: an open map would be copied whole into each worker, and
            # what it has read would count as this process's memory.
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            is_replaced = name == "ecg" and self.ecg_indices is not None
            wanted = self.ecg_indices[indices] if is_replaced else indices
            stored[name] = torch.from_numpy(array[wanted])
        return stored


def make_loader(dataset, keys, workers=0):
    """DataLoader that gives dataset[key] for each of keys, [(epoch, indices), …], in order.

    A key is a whole batch, so that there is nothing left to collect: batch_size=None.
    """
    pin = torch.cuda.is_available()
    return DataLoader(dataset, sampler=keys, batch_size=None, num_workers=workers, pin_memory=pin)


def epoch_batches(indices, batch_size, seed, epoch):
    """Training indices in the order of this epoch, cut into whole batches; the rest waits."""
    order = np.random.default_rng([seed, epoch]).permutation(indices)
    steps = len(indices) // batch_size
    return np.split(order[: steps * batch_size], steps)


def plain_batches(dataset, indices, device="cpu", size=128, workers=0):
    """Float batches of at most `size` subjects, in order, without augmentation."""
    pieces = np.array_split(indices, math.ceil(len(indices) / size))
    keys = [(0, piece) for piece in pieces]
    for stored in make_loader(dataset, keys, workers):
        yield to_batch(stored, device)


def to_batch(stored, device="cpu", seed=None):
    """A stored batch -> {"ecg": float32 (B, 12, 2500) mV, "ed", "es": (B, 1, Z, Y, X) in 0..1}.

    The one way into the model, for training, validation, evaluation and prediction. With a seed,
    subjects vary as in a repeated examination; draws depend on (seed, epoch, index) alone.
    """
    ecg = stored["ecg"].to(device, non_blocking=True)  # as stored, a quarter of the size
    batch = {"ecg": ecg.float().div_(1000)}  # (B, 12, 2500) µV -> mV
    for phase in PHASES:
        if phase in stored:
            greys = stored[phase].to(device, non_blocking=True)  # (B, Z, Y, X)
            batch[phase] = greys.float().div_(255)[:, None]  # (B, 1, Z, Y, X)
    if seed is not None:
        augment(batch, seed, stored["epoch"], stored["indices"])
    return batch


# Uniform draws in 0..1 that a subject takes in an epoch, and how many. New ones go to the end, as
# they are drawn in this order. Geometry and window are one draw for all phases.
DRAWS = {
    "time_shift": 1,
    "ecg_gain": 1,
    "lead_off": 12,
    "wander_hz": 1,
    "wander_phase": 1,
    "wander_mv": 12,
    "ecg_noise": 2,
    "is_moved": 1,
    "angle": 1,
    "shift": 2,
    "grey_gain": 1,
    "grey_offset": 1,
    **{f"{phase}_noise": 2 for phase in PHASES},
}


def augment(batch, seed, epoch, indices):
    """Vary a batch in place as a repeated examination would."""
    count = sum(DRAWS.values())
    rows = [np.random.default_rng([seed, epoch, int(index)]).random(count) for index in indices]
    uniform = torch.from_numpy(np.stack(rows)).float().to(batch["ecg"].device)  # (B, count)
    draws = dict(zip(DRAWS, uniform.split(list(DRAWS.values()), dim=1), strict=True))
    batch["ecg"] = augment_ecg(batch["ecg"], draws)
    add_noise(batch["ecg"], draws["ecg_noise"], 0.015, seed)  # mV
    for phase in PHASES:
        if phase in batch:
            batch[phase] = augment_cmr(batch[phase], draws)
            add_noise(batch[phase], draws[f"{phase}_noise"], 0.04, seed)


def between(draw, low, high):
    return low + (high - low) * draw


def augment_ecg(ecg, draws):
    """(B, 12, T) mV: shift in time, gain, lost leads, baseline wander."""
    # Up to half a second; what leaves at one end comes in at the other.
    steps = between(draws["time_shift"][:, 0], -0.5, 0.5) * SAMPLING_RATE_HZ
    shifted = [leads.roll(-int(step), 1) for leads, step in zip(ecg, steps.tolist(), strict=True)]
    is_on = draws["lead_off"] > 0.03  # (B, 12)
    gain = between(draws["ecg_gain"], 0.9, 1.1) * is_on
    ecg = torch.stack(shifted).mul_(gain[..., None])
    seconds = torch.arange(ecg.shape[2], device=ecg.device) / SAMPLING_RATE_HZ
    turns = between(draws["wander_hz"], 0.1, 0.5) * seconds + draws["wander_phase"]  # (B, T)
    wander = torch.sin(2 * math.pi * turns)[:, None]  # (B, 1, T)
    return ecg.addcmul_(between(draws["wander_mv"], -0.02, 0.02)[..., None], wander)


def augment_cmr(volume, draws):
    """(B, 1, Z, Y, X): in-plane turn and shift, gain, offset.

    No mirror, as the right ventricle has a side, and no scaling, as size is the phenotype.
    """
    angle = between(draws["angle"], -0.2, 0.2)  # (B, 1) radian
    shift = between(draws["shift"], -0.1, 0.1)  # (B, 2) of half the box: up to 9.6 mm
    to_x = torch.cat([angle.cos(), -angle.sin(), shift[:, :1]], dim=1)
    to_y = torch.cat([angle.sin(), angle.cos(), shift[:, 1:]], dim=1)
    affine = torch.stack([to_x, to_y], dim=1)  # (B, 2, 3)
    count, _, _, height, width = volume.shape
    places = F.affine_grid(affine, [count, 1, height, width], align_corners=False)
    # One subject of seven is moved: in short runs, more was too much. Slices are channels here.
    is_moved = draws["is_moved"][:, 0] < 0.15
    moved = F.grid_sample(volume[is_moved, 0], places[is_moved], align_corners=False)
    volume[is_moved, 0] = moved  # (b, Z, Y, X)
    gain = between(draws["grey_gain"], 0.85, 1.15)[..., None, None, None]
    offset = between(draws["grey_offset"], -0.05, 0.05)[..., None, None, None]
    return volume.mul_(gain).add_(offset)


def add_noise(values, draws, largest, seed):
    """Add Gaussian noise in place, of a size up to `largest`: a piece of one fixed table.

    Drawing afresh would take longer than the rest of the augmentation.
    """
    table = noise_table(seed, values.device)
    count = values[0].numel()
    place, strength = draws.unbind(1)  # (B,) each, in 0..1
    starts = (place * (len(table) - count)).long().tolist()
    sizes = between(strength, 0, largest).tolist()
    for sample, start, size in zip(values, starts, sizes, strict=True):
        sample.add_(table[start : start + count].view_as(sample), alpha=size)


@lru_cache
def noise_table(seed, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2**20, generator=generator).to(device)


# ---------------------------------------------------------------- commands


def check(manifest_path, workers=None, mains_hz=50):
    """Read every row of a manifest and report: exit code 0 if all is well, else 2."""
    rows, _ = read_manifest(manifest_path)
    report = Report()
    read_row = partial(prepare_row, manifest_path, mains_hz)
    for subject in run_parallel(read_row, rows, workers, "checking"):
        report.add(subject)
    report.print(manifest_path)
    return 2 if report.rejected else 0


def prepare(manifest_path, folder, workers=None, mains_hz=50):
    """Raw files named by a manifest -> cohort folder; bad rows are reported, the rest goes on."""
    rows, columns = read_manifest(manifest_path)
    subjects = run_parallel(partial(prepare_row, manifest_path, mains_hz), rows, workers)
    source = {"kind": "manifest", "manifest": str(manifest_path), "mains_hz": mains_hz}
    write_cohort(folder, subjects, columns, source).print(folder)


def show(folder, subject, out):
    """Draw one subject: the 12-lead ECG on paper (lines at 0.2 s, 0.5 mV) beside ED and ES."""
    from matplotlib.figure import Figure  # slow to import, needed only here

    cohort = open_cohort(folder)
    matches = np.flatnonzero(cohort.ids == subject)
    require(len(matches) > 0, folder, f"has no subject {subject}; ids run like {cohort.ids[0]}")
    is_replaceable = not Path(out).exists() or Path(out).read_bytes()[:4] == b"\x89PNG"
    require(is_replaceable, out, "exists and is no PNG picture; choose another name")
    batch = next(plain_batches(CohortDataset(cohort), matches))
    figure = Figure(figsize=(11.5, 6.9), layout="constrained")
    mosaic = [["ecg", phase] for phase in PHASES]
    axes = figure.subplot_mosaic(mosaic, width_ratios=(1.45, 1))
    draw_ecg(axes["ecg"], batch["ecg"][0].numpy())
    for phase in PHASES:
        volume = batch[phase][0, 0].numpy()  # (12, 64, 64)
        picture = np.block([[*volume[0:4]], [*volume[4:8]], [*volume[8:12]]])
        axes[phase].imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes[phase].set_title(f"{phase.upper()}, base to apex, {SPACING_MM[0]:g} mm apart")
        axes[phase].axis("off")
    values = [f"{name} {cohort.columns[name][matches[0]]:.3g}" for name in cohort.phenotypes]
    axes["ecg"].set_title(", ".join(values[:8]), fontsize=7, parse_math=False)
    title = f"Subject {subject} ({cohort.split[matches[0]]}, {cohort.source['kind']} cohort)"
    figure.suptitle(title, parse_math=False)
    atomic_write(out, partial(figure.savefig, dpi=80, format="png"))
    print(f"wrote {out}")


def draw_ecg(axis, ecg_mv):
    """12 leads of 2.5 s in four columns, then lead II in full, rows 3 mV apart."""
    seconds = np.arange(ECG_SHAPE[1]) / SAMPLING_RATE_HZ
    strips = [(lead, lead // 3 * 625, 625, lead % 3) for lead in range(12)]
    for lead, start, length, line in [*strips, (1, 0, ECG_SHAPE[1], 3)]:
        span = slice(start, start + length)
        axis.plot(seconds[span], ecg_mv[lead, span] - 3 * line, "k", lw=0.8)
        axis.text(seconds[start] + 0.05, 1.5 - 3 * line, LEADS[lead], weight="bold")
    axis.set_xticks(np.arange(0, 10.1, 0.2), minor=True)
    axis.set_yticks(np.arange(-11, 2.1, 0.5), minor=True)
    axis.grid(which="both", color="#f3c6c6", lw=0.5)
    axis.set(xlim=(0, 10), ylim=(-10.5, 2), xlabel="time (s)", ylabel="mV, rows 3 mV apart")


def parse_arguments(parser, limits):
    """Parse a command line. limits: {name of an option: (smallest, largest value)}."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    args = parser.parse_args()
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        require(value != "", option, "must not be empty")
        if name in limits and value is not None:
            low, high = limits[name]
            require(low <= value <= high, option, f"must be from {low:g} to {high:g}")
    return args


def run_command(main):
    """Run a script: one sentence and exit code 2 for the user's mistakes, 130 when interrupted."""
    code = 2
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show becomes ?
    nibabel.imageglobals.logger.setLevel("CRITICAL")  # headers are checked here
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        rule = f"{error.strerror or error}; check the path, its permissions and the free space"
        print(f"error: {error.filename or 'output'}: {rule}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="validate every row, write nothing")
    preparing = commands.add_parser("prepare", help="raw files -> cohort folder")
    showing = commands.add_parser("show", help="draw one subject")
    for command in (checking, preparing):
        command.add_argument("manifest", help="CSV with columns id, ecg and ed, es or cine")
        mains = "mains frequency to filter out, Hz; 0: none (default 50)"
        command.add_argument("--mains", type=int, choices=(50, 60, 0), default=50, help=mains)
        command.add_argument("--workers", type=int, help="processes (default: one a core)")
    preparing.add_argument("cohort", help="folder to make")
    showing.add_argument("cohort", help="cohort folder")
    showing.add_argument("--subject", required=True, help="id in subjects.csv")
    showing.add_argument("--out", default="subject.png", help="PNG file (default subject.png)")
    args = parse_arguments(parser, {"workers": (1, 1000)})
    if args.command == "show":
        return show(args.cohort, args.subject, args.out)
    if args.command == "check":
        return check(args.manifest, args.workers, args.mains)
    return prepare(args.manifest, Path(args.cohort), args.workers, args.mains)


if __name__ == "__main__":
    run_command(main)
