"""Data: raw ECG and CMR files, or synthetic hearts, become one cohort folder, read back in batches.

    python data.py check manifest.csv                           # validate every row, write nothing
    python data.py prepare manifest.csv cohort/                 # raw files -> cohort folder
    python data.py synthesize cohort/ --subjects 3000 --seed 0  # a synthetic cohort
    python data.py demo folder/ --subjects 12                   # the same hearts as raw files
    python data.py show cohort/ --subject ID --out x.png        # one ECG beside ED and ES slices

The file reads downwards in the order of the data: readers, cleaning, manifest, cohort, batches,
synthetic hearts, commands. Images are always (Z, Y, X): slice, row, column; base to apex where
the file tells.
"""

import argparse
import csv
import ctypes
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, sparse
from scipy import signal as dsp

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SAMPLING_RATE_HZ, SECONDS = 250, 10
ECG_SHAPE = (len(LEADS), SECONDS * SAMPLING_RATE_HZ)
# I and II give the other limb leads. Einthoven: III = II - I. Goldberger: aVR = -(I + II)/2,
# aVL = I - II/2, aVF = II - I/2.
LIMB_LEADS = np.array([[-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]])
GRID, SPACING_MM = (12, 64, 64), (10.0, 3.0, 3.0)  # 120 x 192 x 192 mm holds both ventricles
COVARIATES, SPLITS = ("age", "sex", "bmi"), ("train", "val", "test")
FILES = ("ecg", "ed", "es", "cine", "mask")  # columns of a manifest that name files
FORMAT_VERSION = 1
LARGEST_ECG_MB, LARGEST_IMAGE_MB = 20, 450  # a cine of 512 x 512 x 14 x 30 as float32


class InputError(Exception):
    """The user's input is wrong: where (file, row or argument) and why, in one sentence."""

    def __init__(self, where, why):
        super().__init__(where, why)
        self.where, self.why = printable(where), printable(why)

    def __str__(self):
        return f"{self.where}: {self.why}"


def printable(text):
    """Control characters out of a damaged file stay off the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def require(holds, where, why):
    """How a rule is checked: raise InputError unless it holds."""
    if not holds:
        raise InputError(where, why)


def require_file(path, largest_mb=math.inf):
    require(not os.path.isdir(path), path, "is a folder; name the file in it")
    require(os.path.isfile(path), path, "does not exist; correct the path")
    small = os.path.getsize(path) <= largest_mb * 1e6
    require(small, path, f"is larger than {largest_mb} MB, as no file of its kind is; check it")


@contextmanager
def explain(where, why, errors=Exception, **named):
    """What fails becomes an InputError; {error}, what was raised, and {named} are put into why."""
    try:
        yield
    except errors as error:
        raise InputError(where, why.format(error=error, **named)) from None


# ---------------------------------------------------------------- reading ECGs


def read_ecg(path):
    """Read a 12-lead ECG: dict(ecg_mv (12, T) millivolt in LEADS order, sampling_rate_hz)."""
    path = Path(path)
    reader = {".xml": read_cardiosoft, ".hea": read_wfdb}.get(path.suffix.lower())
    require(reader, path, "is neither CardioSoft .xml nor WFDB .hea; convert it to one of them")
    require_file(path, LARGEST_ECG_MB)
    raw = reader(path)
    leads, rate = raw["leads"], raw["sampling_rate_hz"]
    names = Counter(name for name, _ in leads)
    wrong = ", ".join(f"{name} {names[name]} times" for name in LEADS if names[name] != 1)
    lengths = sorted({len(samples) for _, samples in leads})
    require(not wrong, path, f"must hold each of the 12 leads once but holds {wrong}; export all")
    require(100 <= rate <= 1e4, path, f"sampling rate {rate:g} Hz must be from 100 to 10,000")
    require(len(lengths) == 1, path, f"leads have different lengths {lengths}; export it again")
    leads = dict(leads)
    return {"ecg_mv": np.stack([leads[name] for name in LEADS]), "sampling_rate_hz": rate}


def canonical_lead(name):
    """'avr', 'AVR ' -> 'aVR'; a name that is none of the 12 leads stays as it is."""
    return {lead.lower(): lead for lead in LEADS}.get((name or "").strip().lower(), name)


def read_cardiosoft(path):
    """GE CardioSoft XML (UK Biobank field 20205): the 10 s rhythm of StripData, never median beats.

    Returns, as read_wfdb does, dict(leads: list of (name, samples (T,) in mV), sampling_rate_hz).
    """
    content = path.read_bytes()
    entities = b"<!ENTITY" in content.replace(b"\0", b"")  # as UTF-16, too
    require(not entities, path, "declares XML entities, as no ECG export does; refused for safety")
    why = "is not readable XML ({error}); export it again"
    with explain(path, why, (ElementTree.ParseError, ValueError, LookupError)):
        root = ElementTree.fromstring(content)
    strip, again = root.find(".//StripData"), "export it again"
    require(root.tag == "CardiologyXML", path, f"is <{root.tag:.40}>, not <CardiologyXML>; {again}")
    require(strip is not None, path, f"has no StripData, the 10 s rhythm; {again} with it")
    why = f"StripData has no numeric SampleRate and Resolution; {again}"
    with explain(path, why, (TypeError, ValueError)):
        rate, step_uv = (float(strip.findtext(tag)) for tag in ("SampleRate", "Resolution"))
    require(0.01 <= step_uv <= 100, path, f"Resolution {step_uv:g} µV per LSB is absurd; {again}")
    leads = []
    for block in strip.findall("WaveformData"):
        name = canonical_lead(block.get("lead"))
        if name not in LEADS:  # a further lead, perhaps empty
            continue
        why = "lead {name} holds a sample that is no integer ({error!s:.80}); export it again"
        with explain(path, why, (ValueError, OverflowError), name=name):
            samples = np.array([int(sample) for sample in (block.text or "").split(",")], np.int32)
        leads.append((name, samples * (step_uv / 1000)))
    return {"leads": leads, "sampling_rate_hz": rate}


# file, format 16 (samples a frame, skew, byte offset), gain (baseline) / unit, the rest
WFDB_SIGNAL = re.compile(
    r"(\S+)\s+16(?:x1)?(?::0)?(?:\+(\d{1,9}))?\s+([-+.\deE]+)(?:\(([-+]?\d{1,9})\))?(?:/(\S+))?(\s.*)?"
)
UNITS_MV = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "\ufffdv": 1e-3, "v": 1e3}


def read_wfdb(path):
    """WFDB header with format-16 signals in .dat or .mat (https://wfdb.io/spec/header-files.html)."""
    lines = [line.strip() for line in path.read_bytes().decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    why = "first line must give record, number of signals, rate and length; correct it"
    with explain(path, why, (IndexError, ValueError)):
        record, count, rate, length = lines[0].split()[:4]
        count, rate, length = int(count), float(re.split("[/(]", rate)[0]), int(length)
    require("/" not in record, path, "is a multi-segment record; join its segments into one first")
    why = f"announces {count} signals of {length} samples but lists {len(lines) - 1}; correct it"
    require(0 < count < len(lines) and length > 0, path, why)
    signals = {}  # file -> its signals
    for line in lines[1 : count + 1]:
        match = WFDB_SIGNAL.fullmatch(line)
        why = f"signal line '{line:.60}' is not of format 16 with a gain; convert the record"
        require(match, path, why)
        name, offset, gain, baseline, unit, rest = match.groups()
        rest = (rest or "").split(maxsplit=5)  # bits, zero, first value, checksum, block size, lead
        unit_mv = UNITS_MV.get((unit or "mV").lower())
        require(unit_mv, path, f"unit '{unit}' is none of mV, uV, V; correct the header")
        why = "gain in '{line:.60}' is not a positive number; correct the header"
        with explain(path, why, ValueError, line=line):
            gain, zero = float(gain), int(baseline or (rest[1] if len(rest) > 1 else 0))
            if not 1e-6 < gain < 1e9:
                raise ValueError
        lead = canonical_lead(rest[5] if len(rest) > 5 else None)
        about = {"lead": lead, "zero": zero, "step_mv": unit_mv / gain, "offset": int(offset or 0)}
        signals.setdefault(name, []).append(about)
    leads = []
    for name, own in signals.items():
        source = path.parent / name
        here = Path(name).name == name and len(name.encode()) < 256 and not source.is_symlink()
        require(here, path, f"signal file '{name:.99}' is outside the header's folder; move it in")
        require_file(source, LARGEST_ECG_MB)
        samples, offset = length * len(own), own[0]["offset"]
        whole = source.stat().st_size >= offset + 2 * samples
        require(whole, source, f"ends before the {length} samples of its header; copy it again")
        stored = np.fromfile(source, "<i2", samples, offset=offset).reshape(length, len(own))
        stored = stored.T.astype(np.float64)
        stored[stored == -32768] = np.nan  # the standard's mark of a missing sample
        for row, one in zip(stored, own, strict=True):
            leads.append((one["lead"], (row - one["zero"]) * one["step_mv"]))
    return {"leads": leads, "sampling_rate_hz": rate}


def clean_ecg(ecg_mv, sampling_rate_hz, mains_hz=50, where="ECG"):
    """Millivolt (12, T) at any rate -> int16 microvolt (12, 2500) at 250 Hz, zero-phase filtered.

    High-pass 0.5 Hz against baseline wander, notch at mains_hz (0: none), the middle 10 s. There is
    no z-score: voltage carries the mass of the heart. Returns dict(ecg, warnings).
    """
    seconds = (ecg_mv.shape[1] + 1) / sampling_rate_hz  # exports of 10 s may lack the last sample
    finite, leave = np.isfinite(ecg_mv).all(), "leave this recording out"
    require(finite, where, f"holds missing or non-finite samples; {leave}")
    require(seconds >= SECONDS, where, f"lasts {seconds:.2f} s but 10 s are needed; {leave}")
    ratio = Fraction(SAMPLING_RATE_HZ / sampling_rate_hz).limit_denominator(1000)
    ecg_mv = ecg_mv - np.median(ecg_mv, axis=1, keepdims=True)
    ecg_mv = dsp.resample_poly(ecg_mv, ratio.numerator, ratio.denominator, axis=1)  # 1: a copy
    ecg_mv = dsp.sosfiltfilt(ecg_filter(mains_hz), ecg_mv, axis=1, padlen=2 * SAMPLING_RATE_HZ)
    missing = max(0, ECG_SHAPE[1] - ecg_mv.shape[1])  # resampling 10 s may lose the last sample
    ecg_mv = np.pad(ecg_mv, ((0, 0), (0, missing)), mode="edge")
    start = (ecg_mv.shape[1] - ECG_SHAPE[1]) // 2
    ecg_mv = ecg_mv[:, start : start + ECG_SHAPE[1]]
    flat = ", ".join(name for name, lead in zip(LEADS, ecg_mv, strict=True) if np.ptp(lead) < 0.01)
    require(not flat, where, f"lead {flat} is flat (below 0.01 mV); {leave}")
    peak, residual = np.abs(ecg_mv).max(), limb_lead_residual(ecg_mv)
    require(peak <= 20, where, f"reaches {peak:.0f} mV, as no heart does; check gain and unit")
    why = f"limb leads contradict Einthoven and Goldberger (residual {residual:.0%})"
    require(residual <= 0.2, where, f"{why}; check for exchanged or inverted leads")
    warnings = []
    if peak > 6 or np.ptp(ecg_mv, axis=1).max() < 0.3:
        warnings.append("ECG amplitude is outside the usual 0.3 to 6 mV")
    if residual > 0.05:
        warnings.append("limb leads agree only roughly with Einthoven and Goldberger")
    return {"ecg": np.round(ecg_mv.clip(-10, 10) * 1000).astype(np.int16), "warnings": warnings}


def read_clean_ecg(path, mains_hz=50):
    """Read and clean one ECG file: dict(ecg int16 (12, 2500) microvolt, warnings)."""
    ecg = read_ecg(path)
    return clean_ecg(ecg["ecg_mv"], ecg["sampling_rate_hz"], mains_hz, path)


@lru_cache
def ecg_filter(mains_hz):
    """Second-order sections: Butterworth high-pass 0.5 Hz and, unless 0, a notch at mains_hz."""
    sections = dsp.butter(2, 0.5, "highpass", fs=SAMPLING_RATE_HZ, output="sos")
    if mains_hz:
        notch = dsp.tf2sos(*dsp.iirnotch(mains_hz, 30, fs=SAMPLING_RATE_HZ))
        sections = np.concatenate([sections, notch])
    return sections


def limb_lead_residual(ecg_mv):
    """Largest RMS of III, aVR, aVL, aVF minus what I and II tell, over that of all limb leads."""
    error = np.sqrt(np.square(ecg_mv[2:6] - LIMB_LEADS @ ecg_mv[:2]).mean(axis=1)).max()
    return error / np.sqrt(np.square(ecg_mv[:6]).mean())


# ---------------------------------------------------------------- reading CMR

# Where slices, rows and columns of a short-axis stack point in the patient (right, anterior,
# superior): base to apex, anterior wall to inferior wall, septum to lateral wall.
SHORT_AXIS = np.array([[-0.61, 0.61, -0.51], [0.36, -0.36, -0.86], [-0.71, -0.71, 0.0]])


def open_nifti(path, dimensions=3, beside=None):
    """Read the header of a short-axis NIfTI and check what it announces.

    Returns dict(path, shape, axes, flips, spacing_mm (z, y, x), affine or None, dtype, offset,
    scaling), after which read_voxels orders the file. The slice axis is the one with the thickest
    voxels. Where the affine is sane (orthogonal columns as long as the voxels), rows and columns
    are told apart by it and axes flipped so that every stack runs in the same anatomical
    directions; nothing is ever mirrored otherwise. beside: an opened file of the same heart, whose
    order of axes is taken over unless affines place both.
    """
    require_file(path)
    why = "is not readable NIfTI ({error!s:.80}); convert it again"
    with explain(path, why), nibabel.openers.Opener(path) as file:  # unpacks a .gz
        head = file.read(540)
        kind = nibabel.Nifti2Header if head[4:7] == b"n+2" else nibabel.Nifti1Header
        if b"n+1" != head[344:347] and b"n+2" != head[4:7]:
            raise ValueError("no NIfTI mark")
        size = kind.template_dtype.itemsize
        header = kind(head[:size], check=False)  # as written: nibabel would repair a zero spacing
        header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 means 1
        shape, voxel = header.get_data_shape(), header.get_data_dtype()
        scaling, offset = header.get_slope_inter(), int(header["vox_offset"])
        spacing = header["pixdim"][1:4].astype(float)
        affine = np.array(header.get_best_affine(), float)
        placed = header["sform_code"] > 0 or header["qform_code"] > 0
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    again, why = "convert it again", f"is {len(shape)}D {shape} but {dimensions}D is needed"
    require(len(shape) == dimensions, path, f"{why}; see the manifest's columns")
    require(voxel.kind in "iuf", path, f"holds {voxel} voxels, not grey levels; {again}")
    size_mb = math.prod(shape) * max(voxel.itemsize, 4) / 1e6
    possible = min(shape) > 0 and size_mb <= LARGEST_IMAGE_MB and 0 <= offset < 1e7
    why = f"announces an impossible size {shape} or one over {LARGEST_IMAGE_MB} MB; crop it"
    require(possible, path, f"{why} or {again}")
    why = f"voxel spacing {spacing.tolist()} mm is not positive and plausible"
    require(all(0.1 < mm < 100 for mm in spacing), path, f"{why}; correct the header")
    thick = int(np.flatnonzero(spacing > 0.999 * spacing.max())[-1])  # the last of equals
    axes = [thick] + [axis for axis in (2, 1, 0) if axis != thick]
    slices, *pixels = (shape[axis] for axis in axes)
    why = f"has {slices} slices of {pixels} pixels; a short-axis stack has at least 3 of 16 x 16"
    require(slices >= 3 and min(pixels) >= 16, path, why)
    unit, flips = affine[:3, :3] / spacing, [1, 1, 1]
    sane = placed and np.isfinite(affine).all() and np.allclose(unit.T @ unit, np.eye(3), atol=0.04)
    if beside and not (sane and beside["affine"] is not None):
        axes, flips, sane = beside["axes"], beside["flips"], False
    if sane:
        _, row, column = np.abs(SHORT_AXIS @ unit)  # how much each stored axis runs along them
        if row[axes[2]] + column[axes[1]] > row[axes[1]] + column[axes[2]]:
            axes[1:] = axes[2], axes[1]
        affine = affine[:, axes + [3]]
        for k in range(3):
            if affine[:3, k] @ SHORT_AXIS[k] < 0:  # flip: the origin moves to the axis' other end
                flips[k] = -1
                affine[:, 3] += affine[:, k] * (shape[axes[k]] - 1)
                affine[:, k] *= -1
    placing = {"axes": axes, "flips": flips, "affine": affine if sane else None}
    voxels = {"dtype": voxel, "offset": max(offset, size + 4), "scaling": scaling}
    return {"path": path, "shape": shape, "spacing_mm": spacing[axes], **placing, **voxels}


def read_voxels(nifti):
    """All voxels of an opened NIfTI as float32 (Z, Y, X[, T]) in scanner units."""
    path, shape, (slope, intercept) = nifti["path"], nifti["shape"], nifti["scaling"]
    count, offset = math.prod(shape), nifti["offset"]
    why = "breaks off or cannot be decoded ({error!s:.80}); copy it again"
    with explain(path, why), nibabel.openers.Opener(path) as file:
        # One byte more than needed: at its end a .gz verifies its checksum.
        content = file.read(offset + count * nifti["dtype"].itemsize + 1)
        voxels = np.frombuffer(content, nifti["dtype"], count, offset)
    with np.errstate(all="ignore"):  # what overflows is found below
        voxels = voxels.reshape(shape, order="F").astype(np.float32)
        if slope is not None and (slope, intercept) != (1, 0):
            voxels *= np.float32(slope)
            voxels += np.float32(intercept)
    plausible = -1e9 < voxels.min() and voxels.max() < 1e9  # false for NaN
    require(plausible, path, "holds NaN, infinite or absurd voxels; convert it again")
    voxels = voxels.transpose(nifti["axes"] + list(range(3, voxels.ndim)))  # -> (Z, Y, X[, T])
    return voxels[tuple(slice(None, None, flip) for flip in nifti["flips"])]


def read_phases(row):
    """One manifest row: dict(ed, es float32, spacing_mm (z, y, x), mask, warnings, path).

    Images are (Z, Y, X) in scanner units, the mask boolean or None. A cine, where the row has one,
    goes before ed and es. Raises InputError that names the file and the rule it breaks.
    """
    cine = row.get("cine")
    found = read_cine(row) if cine else read_pair(row)
    ed, es, stack, warnings = (found[name] for name in ("ed", "es", "stack", "warnings"))
    path = cine or row["es"]
    for phase, file in ((ed, cine or row["ed"]), (es, path)):
        require(np.ptp(phase) > 0, file, "a phase is one constant grey level; convert it again")
    require(not np.array_equal(ed, es), path, "ED and ES are the same image; name two phases")
    mask, mm = read_mask(row["mask"], stack) if row.get("mask") else None, stack["spacing_mm"]
    if not (4 <= mm[0] <= 15 and 0.5 <= mm[1] <= 4 and 0.5 <= mm[2] <= 4):
        warnings.append("voxel spacing is unusual (expected 4-15 mm of slices, 0.5-4 mm in plane)")
    return {"ed": ed, "es": es, "mask": mask, "spacing_mm": mm, "warnings": warnings, "path": path}


def read_cine(row):
    """ED and ES of a 4D NIfTI: dict(stack (as open_nifti gives it), ed, es (Z, Y, X), warnings)."""
    stack, warnings = open_nifti(row["cine"], dimensions=4), []
    frames = read_voxels(stack)  # (Z, Y, X, T)
    last, given = frames.shape[3] - 1, {}
    for key in ("ed_frame", "es_frame"):
        frame = number(row.get(key))  # "17.0" is what pandas makes of a column with gaps
        why = f"{key} '{row.get(key)}' is not a frame number from 0 to {last}; correct the manifest"
        require(frame in range(last + 1) or np.isnan(frame or 0), row["cine"], why)
        given[key] = None if np.isnan(frame) else int(frame)
    ed = frames[..., given["ed_frame"] or 0]
    if given["es_frame"] is None:
        given["es_frame"] = estimate_es_frame(frames, ed, stack["spacing_mm"])
        warnings.append("ES frame was estimated from the images")
    return {"stack": stack, "ed": ed, "es": frames[..., given["es_frame"]], "warnings": warnings}


def read_pair(row):
    """ED and ES of two 3D NIfTI files, ES brought onto the grid of ED: returns as read_cine."""
    stack = open_nifti(row["ed"])
    other = open_nifti(row["es"], beside=stack)
    ed, es = read_voxels(stack), read_voxels(other)
    alike = ed.shape == es.shape
    alike = alike and np.allclose(stack["spacing_mm"], other["spacing_mm"], rtol=1e-3)
    if other["affine"] is None:
        why = f"its grid {es.shape} is not ED's {ed.shape} and no affines place both"
        require(alike, row["es"], f"{why}; resample one onto the other")
    elif not (alike and np.allclose(stack["affine"], other["affine"], atol=0.1)):
        to_es = np.linalg.inv(other["affine"]) @ stack["affine"]  # ED voxel -> ES voxel
        # mode "constant" would blacken slices at the edge
        how = {"output_shape": ed.shape, "order": 1, "mode": "grid-constant"}
        covered = ndimage.affine_transform(np.ones_like(es), to_es[:3], **how).sum()
        possible = min(ed.size, es.size / abs(np.linalg.det(to_es)))  # ES may be cropped
        why = f"meets {covered / possible:.0%} of ED by its affine; correct one of the headers"
        require(covered > 0.5 * possible, row["es"], why)
        es = ndimage.affine_transform(es, to_es[:3], **how)
    return {"stack": stack, "ed": ed, "es": es, "warnings": []}


def read_mask(path, stack):
    """A label map on the grid of ED, whose opened file is `stack` -> boolean (Z, Y, X)."""
    labels = open_nifti(path, beside=stack)
    grid, wanted = ([nifti["shape"][axis] for axis in nifti["axes"]] for nifti in (labels, stack))
    there = labels["affine"] is None or np.allclose(labels["affine"], stack["affine"], atol=0.1)
    why = f"its grid {grid} (z, y, x) or place is not ED's {wanted}; use ED's label map"
    require(grid == wanted and there, path, why)
    mask = read_voxels(labels) > 0
    require(mask.any(), path, "labels no voxel; empty the cell or segment the heart")
    return mask


def motion_box(ed, es, spacing_mm):
    """Bounding box (three slices) of where ED and ES differ, i.e. of the beating heart.

    In plane: |ED - ES| averaged over the slices that both have, smoothed 6 mm, weighted by a 70 mm
    prior on the image centre, above 0.3 of its peak, the component that holds the peak. Along z:
    the whole stack.
    """
    shared = ed.any(axis=(1, 2)) & es.any(axis=(1, 2))
    shared |= not shared.any()
    motion = np.abs(ed - es)[shared].mean(axis=0)  # (Y, X)
    motion = ndimage.gaussian_filter(motion, [6 / mm for mm in spacing_mm[1:]])
    y, x = centered_mm(motion.shape, spacing_mm[1:])
    motion = motion * np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 70**2))
    parts, _ = ndimage.label(motion > 0.3 * motion.max())
    heart = parts == parts[np.unravel_index(motion.argmax(), motion.shape)]
    return slice(0, len(ed)), *ndimage.find_objects(heart, 1)[0]


def centered_mm(shape, spacing_mm):
    """Places of the pixels along each axis in mm from the middle of the image."""
    return ((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True))


def estimate_es_frame(frames, ed, spacing_mm):
    """Frame of (Z, Y, X, T) with the least blood in the region that moves over the cycle."""
    box = motion_box(frames.max(axis=3), frames.min(axis=3), spacing_mm)
    bright = frames[box] > np.percentile(ed, [1, 99]).mean()
    return int(bright.sum(axis=(0, 1, 2)).argmin())


def sampling_weights(size, spacing_mm, first_mm, new_size, new_spacing_mm):
    """Weights (new_size, size) that resample one axis; first_mm: place of the first new sample.

    A triangle, the coarser of the two spacings to each side: linear interpolation when refining, an
    anti-aliasing average when coarsening. Sums, hence volumes in ml, are kept; outside is zero.
    """
    step = max(1.0, new_spacing_mm / spacing_mm)
    places = (first_mm + np.arange(new_size) * new_spacing_mm) / spacing_mm
    margin = int(np.ceil(step))
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(-margin, size + margin)) / step)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-6)  # as if the stack went on
    return weights[:, margin : margin + size].astype(np.float32)


def box_weights(shape, spacing_mm, center, grid, grid_spacing_mm):
    """One (new, old) weight matrix per axis for a box of `grid` voxels around voxel `center`.

    The first new sample is put on an old one (at most half a voxel away), so that a stack that
    already has the grid's spacing is cropped without any blur.
    """
    first = np.round(center - (np.array(grid) - 1) / 2 * grid_spacing_mm / spacing_mm)  # old voxel
    axes = zip(shape, spacing_mm, first * spacing_mm, grid, grid_spacing_mm, strict=True)
    return [sampling_weights(*axis) for axis in axes]


def resample(volume, weights):
    """(Z, Y, X) -> grid, axis by axis; most weights are 0."""
    for matrix in weights:  # each time the next axis comes first
        flat = sparse.csr_array(matrix) @ volume.reshape(len(volume), -1)
        volume = np.moveaxis(flat.reshape(len(flat), *volume.shape[1:]), 0, -1)
    return np.ascontiguousarray(volume)


def center_heart(phases, grid=GRID, grid_spacing_mm=SPACING_MM):
    """One box and one intensity window for both phases, as two would normalise contraction away.

    Returns dict(ed, es uint8 (Z, Y, X), weights, warnings).
    """
    ed, es, spacing = phases["ed"], phases["es"], phases["spacing_mm"]
    mask, warnings = phases["mask"], list(phases["warnings"])
    box = motion_box(ed, es, spacing) if mask is None else ndimage.find_objects(mask > 0, 1)[0]
    ends = np.array([[part.start, part.stop - 1] for part in box])  # (3, 2) first and last voxel
    weights = box_weights(ed.shape, spacing, ends.mean(axis=1), grid, grid_spacing_mm)
    inside = np.ix_(*(axis.sum(axis=1) > 0.5 for axis in weights))  # the stack, without margin
    new_ed, new_es = resample(ed, weights), resample(es, weights)
    low, high = np.percentile(np.stack([new_ed[inside], new_es[inside]]), [1, 99])
    why = "shows one constant grey level around the heart; check the image or its mask"
    require(high > low, phases.get("path"), why)
    size_mm, room_mm = np.ptp(ends, axis=1) * spacing, np.multiply(grid, grid_spacing_mm)
    if (size_mm > 0.9 * room_mm)[1:].any():
        warnings.append("the heart touches the border of the box")
    middle = (low + high) / 2
    if (es[box] > middle).sum() > (ed[box] > middle).sum():  # bright voxels: blood
        warnings.append("ES seems to hold more blood than ED; check that they are not exchanged")
    scaled = (((phase - low) / (high - low)).clip(0, 1) * 255 for phase in (new_ed, new_es))
    ed, es = (np.round(phase).astype(np.uint8) for phase in scaled)
    return {"ed": ed, "es": es, "weights": weights, "warnings": warnings}


# ---------------------------------------------------------------- manifest


def read_table(path, required):
    """Read a CSV (comma or ';', UTF-8, BOM allowed) as a list of dicts, each with its line number.

    A row that breaks a rule carries its reason under 'wrong', so that the rest can go on.
    """
    require_file(path)
    with explain(path, "is not UTF-8 (byte {error.start}); save it as 'CSV UTF-8'", UnicodeError):
        text = Path(path).read_bytes().decode("utf-8-sig")
    head = text.split("\n", 1)[0]
    comma = ";" if head.count(";") > head.count(",") else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    why = "line {lines.line_num} is not CSV ({error}); correct it"
    with explain(path, why, csv.Error, lines=lines):
        rows = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(line)]
    columns = rows[0][1] if rows else []
    missing, own = [name for name in required if name not in columns], [*columns, "line", "wrong"]
    header = f"its header is {','.join(columns)[:200] or 'empty'}"
    require(not missing, path, f"has no column {', '.join(missing)}; {header}; add it")
    why = f"names a column twice, or 'line' or 'wrong', which are taken; {header}"
    named = [name for name in own if name]  # Excel exports empty ones
    require(len(set(named)) == len(named), path, why)
    require(len(rows) > 1, path, "has a header but no rows; add one row a subject")
    table, seen = [], {}
    numeric = {*columns} - {"id", *FILES} if comma == ";" else ()  # may be written as 120,5
    for line, cells in rows[1:]:
        row = dict.fromkeys(columns, "") | dict(zip(columns, cells, strict=False))
        for name in numeric:
            row[name] = re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", row[name])
        row["line"] = line
        if len(cells) != len(columns):
            row["wrong"] = f"line {line} has {len(cells)} cells, not {len(columns)}; even them"
        elif not row["id"]:
            row["wrong"] = f"line {line} has an empty id; give each subject one"
        elif row["id"] in seen:
            row["wrong"] = f"id stands in line {seen[row['id']]} already; keep one row a subject"
        seen.setdefault(row["id"], line)
        table.append(row)
    return table


def number(text):
    """Text -> float; nan for an empty cell or "nan", and None for text that is no finite number."""
    try:
        value = float(text.replace("_", "x")) if text else np.nan  # float would read 20209_2_0
    except ValueError:
        return None
    return None if np.isinf(value) else value


def read_manifest(path):
    """Read and check a manifest: dict(rows, columns (those kept), ignored (text, no name))."""
    rows = read_table(path, ("id", "ecg"))
    files = [name for name in FILES if name in rows[0]]
    cmr = {"ed", "es"} <= set(files) or "cine" in files
    require(cmr, path, "has neither columns ed and es nor a column cine; add the CMR files")
    taken = {*files, "id", "line", "split", "wrong", "ed_frame", "es_frame"}
    columns, ignored = [], []
    for name in (name for name in rows[0] if name not in taken):
        values = [number(row[name]) for row in rows if row[name]]
        kept = name in COVARIATES or (name and any(value is not None for value in values))
        (columns if kept else ignored).append(name)
    for row in rows:
        if "wrong" not in row:
            bad = next((name for name in columns if number(row[name]) is None), None)
            split, sex = row.get("split"), row.get("sex")
            valid_sex = number(sex) in (0, 1, None) or np.isnan(number(sex))
            cmr = row.get("cine") or (row.get("ed") and row.get("es"))
            rules = (
                (bad is None, f"{bad} '{row.get(bad)}' is not a number; correct or empty the cell"),
                (valid_sex, f"sex '{sex}' must be 0 (female) or 1 (male)"),
                (not split or split in SPLITS, f"split '{split}' must be train, val or test"),
                (row["ecg"] and cmr, "names no ECG or no pair of ED and ES (or cine); fill it in"),
            )
            broken = [why for holds, why in rules if not holds]
            row |= {"wrong": broken[0]} if broken else {}
            row |= {name: str(Path(path).parent / row[name]) for name in files if row[name]}
            row |= {**dict.fromkeys(ignored, ""), "split": split or split_of(row["id"])}
    return {"rows": rows, "columns": columns, "ignored": ignored}


def split_of(subject):
    """70/15/15 train, val, test by a hash of the id: no other row can move a subject."""
    place = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:4], "big") / 2**32
    return "train" if place < 0.70 else "val" if place < 0.85 else "test"


def prepare_row(manifest, mains_hz, grid, spacing_mm, row):
    """One manifest row -> one cohort row, or the reason why not; never raises, as others go on."""
    try:
        require("wrong" not in row, manifest, row.get("wrong"))
        ecg, phases = read_clean_ecg(row["ecg"], mains_hz), read_phases(row)
        heart = center_heart(phases, grid, spacing_mm)
    except InputError as error:
        return {"id": row["id"], "file": error.where, "reason": error.why}
    except Exception as error:  # a file that breaks a reader must not stop the other 34,000
        why = f"cannot be read ({type(error).__name__}: {error}); check the row's files"
        return {"id": row["id"], "file": row["ecg"], "reason": printable(why)}
    told = [*ecg["warnings"], *heart["warnings"], *implausible(row)]
    return {"row": row, "ecg": ecg["ecg"], "ed": heart["ed"], "es": heart["es"], "warnings": told}


PLAUSIBLE = {"age": (16, 110), "bmi": (12, 70), "LVEF_pct": (5, 90), "RVEF_pct": (5, 90)}


def implausible(row):
    """Warnings about covariates and phenotypes that no adult has or that contradict one another."""
    names = (*PLAUSIBLE, "LVEDV_ml", "LVESV_ml")
    values = {name: number(row.get(name, "")) for name in names}  # nan: unknown, compares as false
    for name, (low, high) in PLAUSIBLE.items():
        if values[name] < low or values[name] > high:
            yield f"{name} is implausible (outside {low} to {high})"
    edv, esv, ef = values["LVEDV_ml"], values["LVESV_ml"], values["LVEF_pct"]
    if abs(100 * (edv - esv) - ef * edv) > 3 * edv:
        yield "LVEF_pct is not 100 (LVEDV_ml - LVESV_ml) / LVEDV_ml"


def in_parallel(function, tasks, workers, what):
    """Yield function(task) in order from several processes, with rate and time left on stderr."""
    started, shown, live = time.time(), 0.0, sys.stderr.isatty()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    pool = ProcessPoolExecutor(workers or len(cores), initializer=serve)
    try:
        for done, result in enumerate(pool.map(function, tasks, chunksize=8), start=1):
            yield result
            if time.time() - shown > (0.5 if live else 10) or done == len(tasks):
                shown = time.time()
                rate = done / (shown - started)
                text = f"{what}: {done}/{len(tasks)} subjects, {rate:.0f}/s"
                end = "\r" if live and done < len(tasks) else "\n"
                print(f"{text}, {(len(tasks) - done) / rate:.0f} s left", file=sys.stderr, end=end)
    except BrokenProcessPool:
        why = "a process was killed, most likely for lack of memory; use fewer processes"
        raise InputError("--workers", why) from None
    finally:  # a second Ctrl-C in here would leave workers that wait for ever
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, heard)


def serve():
    """In a worker: leave Ctrl-C to the parent, and end with it should it be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------- cohort folder

UNWRITABLE = "cannot be written ({error.strerror}); check its permissions and the free space"


def array_layout(grid):
    """What one subject takes in each array of a cohort folder: {name: (type, shape)}."""
    return {"ecg": ("<i2", ECG_SHAPE), "ed": ("|u1", grid), "es": ("|u1", grid)}


def write_cohort(folder, prepared, columns, grid, spacing_mm, source):
    """Write subjects as they come: memory does not grow with their arrays. Returns as `collect`."""
    folder = Path(os.path.realpath(folder))  # a link to a larger disk stays one
    free = not folder.exists() or (folder / "cohort.json").is_file() or not any(folder.iterdir())
    require(free, folder, "exists and is no cohort; choose another name")
    layout = array_layout(grid)
    with replacing(folder) as aside:
        files = {name: open(aside / f"{name}.npy", "wb") for name in layout}

        def write_headers(count):  # numpy leaves room for the number of rows to grow
            for name, (kind, shape) in layout.items():
                head = {"descr": kind, "fortran_order": False, "shape": (count, *shape)}
                files[name].seek(0)
                np.lib.format.write_array_header_1_0(files[name], head)

        write_headers(0)
        kept = collect(prepared, files)
        rows, rejected = kept["rows"], kept["rejected"]
        write_headers(len(rows))
        for file in files.values():
            file.close()
        reasons = summarize_rejected(rejected)
        require(rows, folder, f"not made, as none of {len(rejected)} rows is usable; {reasons}")
        splits = dict.fromkeys(SPLITS, 0) | Counter(row["split"] for row in rows)
        counts = {"subjects": len(rows), **splits, "rejected": len(rejected)}
        write_csv(aside / "subjects.csv", ["id", "split", *columns], rows)
        write_csv(aside / "rejected.csv", ["id", "file", "reason"], rejected)
        about = {"format_version": FORMAT_VERSION, "grid": grid, "spacing_mm": spacing_mm}
        about |= {"sampling_rate_hz": SAMPLING_RATE_HZ, "leads": LEADS, "source": source}
        (aside / "cohort.json").write_text(json.dumps({**about, "counts": counts}, indent=1))
    return kept


def collect(prepared, files):
    """Append the arrays of prepared subjects to open files, by name, and keep the rest.

    prepared: iterable of dict(ecg, ed, es, warnings, row) or dict(id, file, reason). Returns
    dict(rows, rejected (list of dict(id, file, reason)), warnings (Counter)).
    """
    rows, rejected, warnings = [], [], Counter()
    for subject in prepared:
        if "reason" in subject:
            rejected.append(subject)
            continue
        for name, file in files.items():
            file.write(subject[name].tobytes())
        rows.append(subject["row"])
        warnings.update(subject["warnings"])
    return {"rows": rows, "rejected": rejected, "warnings": warnings}


@contextmanager
def alone(folder):
    """One at a time makes cohorts beside `folder`; whoever is killed leaves no lock behind."""
    place = Path(os.path.realpath(folder)).parent
    with explain(folder, UNWRITABLE, OSError):
        place.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that makes a cohort in {place}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # some network drives know no locks
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def replacing(folder):
    """Give a folder aside, which takes the place of `folder` when all in it is written.

    Whatever happens, the old folder or the new one bears the name; killed between two renames, from
    the next run on.
    """
    aside, old = (folder.with_name(folder.name + end) for end in (".partial", ".replaced"))

    def tidy():
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)

    if aside.exists() or old.exists():
        print(f"tidying up after an interrupted run that wrote {folder}", file=sys.stderr)
        tidy()
    try:
        with explain(folder, UNWRITABLE, OSError):
            aside.mkdir(parents=True)
            yield aside
            if folder.exists():
                folder.rename(old)
            aside.rename(folder)
    finally:
        tidy()


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write(path, save):
    """Call save(file) aside, then rename: no name ever holds half a file."""
    aside = Path(f"{path}.partial")
    with explain(path, UNWRITABLE, OSError):
        with open(aside, "wb") as file:
            save(file)
        aside.replace(path)


def summarize_rejected(rejected):
    """Reasons alike but for numbers and (details) grouped, most frequent first, with an example."""
    kinds = {}
    for bad in rejected:
        kinds.setdefault(re.sub(r"\(.*?\)|\d", "", bad["reason"]), []).append(bad)
    ranked = sorted(kinds.values(), key=len, reverse=True)
    told = [f"{len(kind)}x {kind[0]['reason']} (e.g. {kind[0]['file']})" for kind in ranked]
    return "; ".join(told[:5] + [f"and {len(told) - 5} more kinds"] * (len(told) > 5))


def open_cohort(folder):
    """Check a cohort folder and read everything but its arrays, which stay on disk.

    Returns dict(folder, ids and split (N,) str, columns {name: (N,) float}, covariates, phenotypes,
    outcomes (lists of names), grid, spacing_mm, source, fingerprint).
    """
    folder = Path(folder)
    about_path, table_path = folder / "cohort.json", folder / "subjects.csv"
    require(about_path.is_file(), folder, "is no cohort (has no cohort.json); see data.py prepare")
    damaged = "is damaged; prepare the cohort again"
    errors = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
    with explain(about_path, damaged, errors):
        text = about_path.read_bytes()
        about = json.loads(text)
        version, source, kind = about["format_version"], about["source"], about["source"]["kind"]
        grid, spacing_mm = tuple(map(int, about["grid"])), list(map(float, about["spacing_mm"]))
        valid = isinstance(kind, str) and len(grid) == len(spacing_mm) == 3
        valid = valid and min(grid) > 0 and all(0 < mm < 1e3 for mm in spacing_mm)
    why = f"has format {version}, this code reads {FORMAT_VERSION}; update the code"
    require(version == FORMAT_VERSION, folder, why)
    require(valid, about_path, damaged)
    rows = read_table(table_path, ("id", "split"))
    names = [name for name in rows[0] if name not in ("id", "split", "line", "wrong")]
    for row in rows:
        known = row["split"] in SPLITS and all(number(row[name]) is not None for name in names)
        why = row.get("wrong", f"line {row['line']} has an unknown split or text for a number")
        require("wrong" not in row and known, table_path, f"{why}; prepare again")
    columns = {name: np.array([number(row[name]) for row in rows]) for name in names}
    for name, (kind, shape) in array_layout(grid).items():
        path, wanted = folder / f"{name}.npy", (len(rows), *shape)
        with explain(path, "is missing or damaged ({error!s:.80}); prepare again"):
            array = np.lib.format.open_memmap(path, mode="r")
        fits = array.dtype == kind and array.shape == wanted and array.flags.c_contiguous
        found = f"is {array.dtype} {array.shape}; subjects.csv and cohort.json"
        require(fits, path, f"{found} need {np.dtype(kind)} {wanted}; prepare again")
    values = {name: column[~np.isnan(column)] for name, column in columns.items()}
    filled = [name for name in names if len(values[name])]
    targets = [name for name in filled if name not in COVARIATES]
    kinds = {"covariates": [name for name in COVARIATES if name in filled]}
    kinds["outcomes"] = [name for name in targets if np.isin(values[name], (0, 1)).all()]
    kinds["phenotypes"] = [name for name in targets if name not in kinds["outcomes"]]
    digest = hashlib.sha256(text + table_path.read_bytes()).hexdigest()[:16]
    about = {"grid": grid, "spacing_mm": spacing_mm, "source": source, "fingerprint": digest}
    split = np.array([row["split"] for row in rows])
    table = {"ids": np.array([row["id"] for row in rows]), "split": split, "columns": columns}
    return {"folder": folder, **table, **kinds, **about}


def find_cohort(data=None):
    """What --data names, opened: a cohort folder, a manifest or, when nothing, synthetic hearts.

    A manifest is prepared once into cohorts/ with the default grid and a 50 Hz notch; others need
    data.py prepare. Returns and raises as open_cohort does.
    """
    if data and Path(data).is_dir():
        return open_cohort(data)
    folder, make = Path("cohorts/synthetic-3000-0"), partial(synthesize, subjects=3000, seed=0)
    if data:
        manifest = read_manifest(data)
        state = hashlib.sha256(Path(data).read_bytes())  # and of size and date of the files:
        for row in manifest["rows"]:
            stem, _ = os.path.splitext(row["ecg"])
            named = [*(row.get(name, "") for name in FILES), stem + ".dat", stem + ".mat"]
            found = [os.stat(file) for file in named if os.path.exists(file)]
            state.update(str([(file.st_size, file.st_mtime_ns) for file in found]).encode())
        name = f"{Path(data).stem}-{state.hexdigest()[:8]}"
        folder, make = Path("cohorts") / name, partial(prepare, data)
    if not folder.exists():
        with alone(folder):
            if not folder.exists():  # another process may have made it meanwhile
                make(folder)
    return open_cohort(folder)


# ---------------------------------------------------------------- batches


def read_batch(cohort, rows, device="cpu", ecg_rows=None, names=("ecg", "ed", "es"), varied=None):
    """Rows of a cohort as float32: dict(ecg (B, 12, 2500) mV, ed, es (B, 1, Z, Y, X) in 0..1).

    ecg_rows: whose ECG to put beside each heart, for the negative control; default their own.
    varied: (seed, epoch), for training: as `augment` makes them, which may leave 0..1 a little;
    default as they are.
    The map of a file gives its layout; rows are then read, not touched through the map, as mapped
    pages (up to 2 MB around a row where the system uses large ones) would count as resident memory.
    """
    stored = {}
    for name in names:
        wanted = ecg_rows if name == "ecg" and ecg_rows is not None else rows
        mapped = np.load(cohort["folder"] / f"{name}.npy", mmap_mode="r")
        array = np.empty((len(wanted), *mapped.shape[1:]), mapped.dtype)
        with open(mapped.filename, "rb", buffering=0) as file:
            for k, row in enumerate(wanted):
                file.seek(mapped.offset + int(row) * array[0].nbytes)
                file.readinto(array[k])
        stored[name] = torch.from_numpy(array).to(device)  # small as stored: converted there
    return augment(stored, rows, *varied, cohort["spacing_mm"]) if varied else as_batch(stored)


def as_batch(stored):
    """Arrays as a cohort stores them, (B, ...), as they are: a batch as read_batch gives it."""
    scale = {"ecg": 1e-3, "ed": 1 / 255, "es": 1 / 255}
    batch = {name: x.float().mul_(scale[name]) for name, x in stored.items()}
    return {name: x if name == "ecg" else x[:, None] for name, x in batch.items()}


def epoch_batches(rows, batch_size, seed, epoch):
    """Training rows in the order of this epoch, cut into whole batches; the rest waits its turn."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [order[k : k + batch_size] for k in range(0, len(rows) - batch_size + 1, batch_size)]


def read_ahead(load, tasks):
    """Yield load(task) in order, one task ahead on a thread, so that no step waits for data.

    The thread works alone: a second team of threads would compete with that of the step.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting = []  # taken out before it is given away: a name for it would keep its memory
        for task in tasks:
            waiting.append(thread.submit(load, task))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


@lru_cache
def noise_table(seed, device, rounds):
    table = torch.randn(2**20, generator=torch.Generator().manual_seed(seed))
    return table.repeat(rounds).to(device)  # a large grid goes around it more than once


def augment(stored, rows, seed, epoch, spacing_mm=SPACING_MM):
    """Vary subjects as a repeated examination would: a batch in the shapes and units of read_batch.

    stored: the arrays of the cohort's files, ecg int16 (B, 12, 2500) in microvolt and perhaps ed
    and es uint8 (B, Z, Y, X); rows (B,): the subjects' rows in the cohort. Draws depend on (seed,
    epoch, subject) only; noise also on which phases there are.

    ECG: time shift, gain +-10 %, noise, baseline wander, lead dropout. CMR: gain, offset, noise
    and, for one subject of seven, a shift and an in-plane turn. Geometry is one draw for both
    phases, without mirror (the right ventricle has a side) and without scaling (size is the
    phenotype).
    """
    ecg, leads = stored["ecg"], stored["ecg"].shape[1]
    draws = np.stack([np.random.default_rng([seed, epoch, int(row)]).random(64) for row in rows])
    draws = torch.from_numpy(draws.astype(np.float32)).to(ecg.device)  # (B, 64) in 0..1
    columns = iter(draws.T)

    def uniform(low, high, n=1):  # (B, n)
        return low + (high - low) * torch.stack([next(columns) for _ in range(n)], 1)

    def add_noise(x, highest):  # a subject's piece of one fixed table, as drawing afresh is slow
        table = noise_table(seed, ecg.device, rounds=math.ceil(x[0].numel() / 2**20))
        starts, sizes = uniform(0, 1)[:, 0].tolist(), uniform(0, highest)[:, 0].tolist()
        for one, start, size in zip(x, starts, sizes, strict=True):
            first = int(start * (len(table) - one.numel()))
            one.add_(table[first : first + one.numel()].view_as(one), alpha=size)

    # Up to half a second; what leaves at one end comes in at the other.
    shifts = (uniform(-0.5, 0.5)[:, 0] * SAMPLING_RATE_HZ).tolist()
    ecg = torch.stack([one.roll(-int(k), 1) for one, k in zip(ecg, shifts, strict=True)])
    gain = uniform(0.9, 1.1) * (uniform(0, 1, leads) > 0.03)  # of some leads 0: an electrode is off
    ecg = ecg * (1e-3 * gain)[..., None]  # mV
    seconds = torch.arange(ecg.shape[2], device=ecg.device) / SAMPLING_RATE_HZ
    wander = torch.sin(2 * math.pi * (uniform(0.1, 0.5) * seconds + uniform(0, 1)))  # (B, T)
    ecg.addcmul_(uniform(-0.02, 0.02, leads)[..., None], wander[:, None])  # mV
    add_noise(ecg, 0.015)  # mV

    batch, phases = {"ecg": ecg}, [name for name in ("ed", "es") if name in stored]
    if not phases:
        return batch
    height, width = stored[phases[0]].shape[2:]
    ratio = height * spacing_mm[1] / (width * spacing_mm[2])  # of the box, in mm
    angle = uniform(-0.2, 0.2)  # radian
    move = uniform(-0.1, 0.1, 2)  # of half the box: up to 9.6 mm at the default grid
    to_x = torch.cat([angle.cos(), -angle.sin() * ratio, move[:, :1]], 1)
    to_y = torch.cat([angle.sin() / ratio, angle.cos(), move[:, 1:]], 1)
    turn = torch.stack([to_x, to_y], 1)  # (B, 2, 3), rows of affine matrices
    places = F.affine_grid(turn, (len(turn), 1, height, width), align_corners=False)
    moved = uniform(0, 1)[:, 0] < 0.15  # few: in 12 epochs, more was too much
    gain, offset = uniform(0.85, 1.15)[..., None, None], uniform(-0.05, 0.05)[..., None, None]
    for phase in phases:
        volume = stored[phase].float()  # (B, Z, Y, X), slices as channels of a 2D image
        volume[moved] = F.grid_sample(volume[moved], places[moved], align_corners=False)
        volume.mul_(gain / 255).add_(offset)
        add_noise(volume, 0.04)
        batch[phase] = volume[:, None]
    return batch


# ---------------------------------------------------------------- synthetic hearts

STACK, STACK_MM = (12, 72, 72), (10.0, 3.0, 3.0)  # the simulated scanner's field of view
HEART = np.s_[:, 10:62, 10:62]  # the part of it that can hold the heart
# X (left), Y (foot), Z (back) of the heart vector -> I, II, V1..V6 (Dower 1980)
DOWER_X = [0.632, 0.235, -0.515, 0.044, 0.882, 1.213, 1.125, 0.831]
DOWER_Y = [-0.235, 1.066, 0.157, 0.164, 0.098, 0.127, 0.127, 0.076]
DOWER_Z = [0.059, -0.132, -0.917, -1.387, -1.277, -0.601, -0.086, 0.230]
DOWER = np.stack([DOWER_X, DOWER_Y, DOWER_Z], axis=1)
PHENOTYPES = "LVEDV_ml LVESV_ml LVSV_ml LVEF_pct LVM_g RVEDV_ml RVESV_ml RVEF_pct".split()
OUTCOMES = ["heart_failure", "atrial_fibrillation", "hypertension"]
SYNTHETIC_COLUMNS = [*COVARIATES, *PHENOTYPES, *OUTCOMES]


def draw_heart(seed, subject):
    """State of one synthetic subject, a function of (seed, subject) alone.

    Means and spreads after Petersen 2017 (J Cardiovasc Magn Reson 19:18), widened by a tenth of
    failing and a fifth of hypertrophic hearts. Returns a dict of scalars, units in the names.
    """
    rng = np.random.default_rng([seed, subject, 0])
    normal, uniform = rng.standard_normal, rng.uniform
    sex = int(uniform() < 0.48)
    age = float(np.clip(64 + 7.6 * normal(), 45, 82))
    height_cm = (163 + 6.3 * normal(), 176 + 6.7 * normal())[sex]
    bmi = (26.0, 27.2)[sex] * np.exp(0.15 * normal())
    surface_m2 = np.sqrt(height_cm * bmi * (height_cm / 100) ** 2 / 3600)  # Mosteller
    size = surface_m2 / (1.72, 1.98)[sex]
    failing = (uniform() < 0.10) * uniform(0.3, 1.0)
    hypertrophy = (uniform() < 0.20) * uniform(0.1, 0.45)
    dilation = 0.13 * normal()
    lvef = np.clip((61.0, 58.5)[sex] + 4.6 * normal() - 24 * failing, 18, 78)
    lvedv = (123, 164)[sex] * size * np.exp(dilation + 0.25 * failing - 0.004 * (age - 64))
    lvsv = lvedv * lvef / 100
    thick = 0.4 * dilation + hypertrophy + 0.12 * failing + 0.10 * normal()
    lvm = (67, 98)[sex] * size * np.exp(thick)
    rvef = np.clip((58.0, 54.5)[sex] + 5.8 * normal() + 0.25 * (lvef - 60), 20, 78)
    rvedv = lvsv * np.exp(0.08 * normal()) / (rvef / 100)
    heart_rate = np.clip(2900 * surface_m2 * np.exp(0.14 * normal()) / lvsv, 40, 115)
    depth_mm = 30 + 0.9 * (bmi - 26.5) + 7 * normal()  # from the chest wall to the heart
    turn_deg, tilt = 12 * normal(), 0.10 * normal()  # of the heart in the chest
    # Outcomes: a noisy logistic of the state, prevalence about 6, 9 and 30 %.
    logits = {
        "heart_failure": -3.6 + 0.14 * (59 - lvef) + 0.05 * (age - 64),
        "atrial_fibrillation": -2.7 + 0.07 * (age - 64) + 0.04 * (59 - lvef) + 2 * dilation,
        "hypertension": -1.2 + 5 * hypertrophy + 0.05 * (age - 64) + 0.08 * (bmi - 26),
    }
    events = {name: int(uniform() < 1 / (1 + np.exp(-logit))) for name, logit in logits.items()}
    lvesv, rvesv = lvedv - lvsv, rvedv * (1 - rvef / 100)
    values = (lvedv, lvesv, lvsv, lvef, lvm, rvedv, rvesv, rvef)
    phenotypes = dict(zip(PHENOTYPES, values, strict=True))
    body = {"surface_m2": surface_m2, "heart_rate_bpm": heart_rate}
    place = {"depth_mm": depth_mm, "turn_deg": turn_deg, "tilt": tilt}
    return {"age": age, "sex": sex, "bmi": bmi, **phenotypes, **events, **body, **place}


def simulate_ecg(heart, rng):
    """12-lead ECG (12, 5000) in mV at 500 Hz with 5 uV resolution, as a recorder would store it.

    P, Q, R, S, T are Gaussians in time on a heart vector (McSharry 2003; Sameni 2007), projected by
    the Dower matrix. Planted links: mass -> QRS voltage and axis; dilatation and low EF -> QRS
    duration, initial forces, QT; strain -> T amplitude and angle; RV -> terminal forces; stroke
    volume -> heart rate; depth, turn and tilt of the heart in the chest, which CMR shows too ->
    gain of the chest leads and electrical axis. Nuisance: gain, axes, noise, baseline wander,
    mains, RR variability.
    """
    normal, rate = rng.standard_normal, 500
    weak = 60 - heart["LVEF_pct"]
    mass_index = heart["LVM_g"] / heart["surface_m2"] / (42, 52)[heart["sex"]] - 1
    strain = 2.2 * mass_index + 0.065 * weak
    torso = np.exp(0.08 * normal() - 0.25 * np.log(heart["bmi"] / 26.5))
    qrs = torso * (heart["LVM_g"] / 85) ** 0.75 * np.exp(0.14 * normal())
    width = 90 + 5 * (heart["sex"] - 0.5) + 0.10 * (heart["LVEDV_ml"] - 145) + 0.42 * weak
    width = (width + 6 * normal()) / 90
    axis = 45 - 0.5 * (heart["age"] - 64) - 1.2 * (heart["bmi"] - 26.5) - 8 * strain
    axis = np.deg2rad(axis + 0.8 * heart["turn_deg"] + 11 * normal())
    back = 0.25 + 0.008 * weak + 1.0 * heart["tilt"] + 0.12 * normal()
    t_axis = np.deg2rad(40 + 14 * strain + 12 * normal())
    t_wave = torso * (1, 1.15)[heart["sex"]] * np.exp(-0.22 * strain + 0.25 * normal())
    initial = -0.34 + 0.008 * weak + 0.10 * normal()  # septal force towards the front
    right = 0.5 * np.log(heart["RVEDV_ml"] / 150) + 0.012 * (56 - heart["RVEF_pct"])
    right = right + 0.16 * normal()
    rr_s = 60 / heart["heart_rate_bpm"]
    pr_s = (160 + 0.6 * (heart["age"] - 64) + 18 * normal()) / 1000
    qt_s = (412 - 14 * heart["sex"] + 0.9 * weak + 15 * normal()) / 1000 * np.sqrt(rr_s)  # Bazett
    waves = [  # centre (s after R), width (s), vector (left, foot, back) in mV
        (-pr_s + 0.02, 0.022, 0.11 * torso * np.exp(0.2 * normal()) * np.array([0.6, 0.8, -0.1])),
        (-0.024 * width, 0.008 * width, qrs * np.array([-0.14, 0.04, initial])),
        (0, 0.011 * width, 1.55 * qrs * np.array([np.cos(axis), np.sin(axis), back])),
        (0.026 * width, 0.010 * width, qrs * np.array([-0.20 - 0.5 * right, 0.02, 0.55])),
        (qt_s - 0.150, 0.048, 0.20 * t_wave * np.array([np.cos(t_axis), np.sin(t_axis), -0.55])),
        (qt_s - 0.095, 0.030, 0.30 * t_wave * np.array([np.cos(t_axis), np.sin(t_axis), -0.45])),
    ]
    seconds = np.arange(SECONDS * rate) / rate
    vector = np.zeros((3, len(seconds)))
    beat = -rng.uniform(0, rr_s)
    while beat < SECONDS + 0.5:
        low, high = np.searchsorted(seconds, [beat - 0.4, beat + 0.7])
        for center, spread, amplitude in waves:
            wave = np.exp(-0.5 * ((seconds[low:high] - beat - center) / spread) ** 2)
            vector[:, low:high] += amplitude[:, None] * wave
        breath = 0.03 * np.sin(2 * np.pi * 0.25 * beat)
        beat += rr_s * (1 + breath + 0.02 * normal())
    leads = DOWER @ vector  # (8, T): I, II, V1..V6
    leads[2:] *= np.exp(-0.02 * (heart["depth_mm"] - 30) + 0.08 * normal())  # chest leads are near
    leads += 0.012 * normal(leads.shape)
    for size_mv, hertz in ((0.10, rng.uniform(0.1, 0.4)), (0.012, 50)):  # baseline wander, mains
        turn = 2 * np.pi * hertz * seconds
        leads += size_mv * normal((8, 2)) @ np.stack([np.sin(turn), np.cos(turn)])
    ecg_mv = np.concatenate([leads[:2], LIMB_LEADS @ leads[:2], leads[2:]])
    return np.round(ecg_mv / 0.005) * 0.005


def phantom(heart, rng):
    """Geometry of a short-axis stack: {phase: {tissue: fraction of each voxel in HEART}}.

    The LV cavity is an ellipsoid cut at the base, its volume EDV or ESV; the wall lies between it
    and a larger one, its volume mass / 1.05 g/ml at both phases, so that it thickens; the base
    descends; the RV is a crescent on the septal side. Fractions add up to the stated volumes.
    """
    normal, (mm_z, mm, _) = rng.standard_normal, STACK_MM
    length = 94 * (heart["LVEDV_ml"] / 140) ** (1 / 3) * np.exp(0.05 * normal())
    length = min(length, 106)  # base to apex, mm
    first_base = 56 - length / 2 + np.clip(normal(), -2, 2)  # mm below the top of the stack
    tilt, jitter = np.array([heart["tilt"], 0.05 * normal()]), 1.0 * normal((STACK[0], 2))
    shift = np.array([0, 16]) + 4 * normal(2)
    septum = np.pi + np.deg2rad(heart["turn_deg"] + 5 * normal())  # the RV is on the left
    slices = np.arange(STACK[0])[:, None, None]
    edges = np.array([slices, slices + 1]) * mm_z  # (2, Z, 1, 1) from the top of the stack
    axis = shift + (slices[:, 0] - 5.5) * mm_z * tilt + jitter  # (Z, 2) place of the LV axis, mm
    y, x = centered_mm(STACK[1:], STACK_MM[1:])
    y, x = y[HEART[1]], x[HEART[2]]
    dy = (y - axis[:, :1])[:, :, None].astype(np.float32)  # (Z, Y, 1)
    dx = (x - axis[:, 1:])[:, None, :].astype(np.float32)  # (Z, 1, X)
    radius = np.sqrt(dy**2 + dx**2)  # (Z, Y, X) distance from the LV axis, mm

    def crescent(cosine):  # depth of the RV in each direction as a part of its depth at the septum
        return np.clip((cosine + 0.05) / 1.05, 0, 1) ** 0.8

    septal = dx * np.float32(np.cos(septum)) + dy * np.float32(np.sin(septum))
    reach = crescent(septal / np.maximum(radius, 1))
    angles = crescent(np.cos(np.linspace(-np.pi, np.pi, 720, endpoint=False)))

    def slabs(equator, top, a, c):  # an ellipsoid's exact volume: mean radius and part of a slice
        faces = np.clip(edges - equator, top, c)
        depth = np.maximum(np.diff(faces, axis=0)[0], 1e-9)
        square = np.diff(faces - faces**3 / (3 * c * c), axis=0)[0] * a * a / depth
        return np.float32(np.sqrt(square)), np.float32(depth / mm_z)  # (Z, 1, 1)

    def disc(edge):  # how much of each pixel lies within `edge` mm of the LV axis
        return np.clip((edge - radius) / mm + 0.5, 0, 1)

    phases = {}
    for phase, descent in (("ed", 0.0), ("es", 14 * heart["LVEF_pct"] / 60)):
        lv_mm3, rv_mm3 = (1000 * heart[f"{side}{phase.upper()}V_ml"] for side in ("LV", "RV"))
        base, c = first_base + descent, (length - descent) / 1.25  # cut a quarter above the equator
        top, equator = -0.25 * c, base + 0.25 * c
        a = np.sqrt(lv_mm3 / (np.pi * c * (2 / 3 + 0.25 - 0.25**3 / 3)))
        heart_mm3 = lv_mm3 + heart["LVM_g"] / 1.05e-3
        thin, thick = 0.0, 60.0  # bisection on the wall's thickness; at the apex it is 0.6 of it
        for _ in range(30):
            wall = (thin + thick) / 2
            tip = c + 0.6 * wall
            whole = np.pi * (a + wall) ** 2 * (tip * 2 / 3 - top + top**3 / (3 * tip**2))
            thin, thick = (wall, thick) if whole < heart_mm3 else (thin, wall)
        inner, inner_part = slabs(equator, top, a, c)
        outer, outer_part = slabs(equator, top, a + wall, c + 0.6 * wall)
        faces = np.clip(edges - base, 0, 0.9 * (length - descent))
        above = np.diff(np.clip(edges, base - 30, base), axis=0)[0] / mm_z
        rv_part = np.float32(np.diff(faces, axis=0)[0] / mm_z)
        taper = np.float32(np.sqrt(1 - (faces.mean(axis=0) / (length - descent)) ** 2))
        # RV volume = linear * depth + square * depth^2, solved for the depth at the base
        linear = (rv_part * outer * taper).sum() * angles.mean() * 2 * np.pi * mm_z
        square = (rv_part * taper**2).sum() * (angles**2).mean() * np.pi * mm_z
        depth = float(np.sqrt(linear**2 + 4 * square * rv_mm3) - linear) / float(2 * square)
        free_wall = outer + depth * taper * reach
        cavity, heart_disc, rv_disc = inner_part * disc(inner), disc(outer), disc(free_wall)
        one = (dy - 0.5 * inner) ** 2 + (dx + 0.3 * inner) ** 2
        other = (dy + 0.5 * inner) ** 2 + (dx - 0.2 * inner) ** 2
        muscles = np.clip((5 - np.sqrt(np.minimum(one, other))) / mm, 0, 1)
        phases[phase] = {
            "lv": cavity,
            "myocardium": outer_part * heart_disc - cavity,
            "rv": rv_part * (rv_disc - heart_disc),
            "rv_wall": rv_part * (disc(free_wall + (reach > 0) * np.float32(4)) - rv_disc),
            "fat": np.maximum(outer_part, rv_part) * (disc(free_wall + 7) - heart_disc),
            "atria": np.float32(above) * disc(np.float32(18 if phase == "ed" else 23)),
            "papillary": inner_part * muscles * cavity,
        }
    return phases


def simulate_cmr(heart, rng):
    """The phantom as scanned, as from read_phases; its mask labels ED: 1 RV, 2 wall, 3 LV."""
    tissues = phantom(heart, rng)
    y, x = centered_mm(STACK[1:], STACK_MM[1:])
    y, x = y[:, None] + 3 * rng.standard_normal(), x + 4 * rng.standard_normal()

    def smooth(coarse):  # random field (5, 11, 11) at 30 x 24 x 24 mm -> (Z, Y, X)
        axes = zip(coarse.shape, (30, 24, 24), STACK, STACK_MM, strict=True)
        to_z, to_y, to_x = (sampling_weights(m, old, 0, n, mm) for m, old, n, mm in axes)
        return np.tensordot(to_z, to_y @ (coarse.astype(np.float32) @ to_x.T), axes=1)

    texture = 1 + 0.35 * smooth(rng.standard_normal((5, 11, 11)))
    body = np.full(STACK[1:], 0.10)  # lung, and in it:
    for cy, cx, reach_mm, level in ((120, -70, 100, 0.42), (115, 75, 75, 0.30), (62, 52, 11, 0.90)):
        body += (level - body) * np.clip((reach_mm - np.hypot(y - cy, x - cx)) / 8 + 0.5, 0, 1)
    for reach_mm, level in ((0, 0.60), (10 + 0.5 * heart["bmi"], 0.02)):  # ... chest wall, air
        reach_mm += 92 + heart["depth_mm"]
        body += (level - body) * np.clip((np.hypot(y - 35, x - 30) - reach_mm) / 8 + 0.5, 0, 1)
    bias = 1 + 0.25 * smooth(rng.standard_normal((5, 11, 11)).cumsum(axis=1) / 4)
    scale, sigma = float(260 * np.exp(0.25 * rng.standard_normal())), rng.uniform(0.02, 0.05)
    levels = {"atria": 0.8, "fat": 0.42, "rv_wall": 0.33}  # in this order
    levels |= {"rv": 0.92, "myocardium": 0.3, "lv": 1, "papillary": 0.35}
    phases, grain = {}, (0.9 + 0.1 * texture)[HEART]
    for phase, parts in tissues.items():
        picture = body.astype(np.float32) * texture
        inside = picture[HEART]  # a view: what it gains, picture gains
        for tissue, level in levels.items():
            inside += (level * grain - inside) * parts[tissue]
        noise = np.float32(sigma) * rng.standard_normal((2, *STACK), dtype=np.float32)
        rician = np.sqrt((picture * bias + noise[0]) ** 2 + noise[1] ** 2)
        phases[phase] = np.round(scale * rician).astype(np.float32)  # whole grey levels
    labels = np.zeros(STACK, np.uint8)
    for label, tissue in enumerate(("rv", "myocardium", "lv"), start=1):
        labels[HEART][tissues["ed"][tissue] > 0.5] = label
    return {**phases, "mask": labels, "spacing_mm": np.array(STACK_MM), "warnings": []}


def simulate(seed, subject):
    """One synthetic subject as raw data: dict(row, heart, ecg_mv (12, 5000) at 500 Hz, phases)."""
    heart, name = draw_heart(seed, subject), f"{subject:06d}"
    phases = simulate_cmr(heart, np.random.default_rng([seed, subject, 1]))
    ecg_mv = simulate_ecg(heart, np.random.default_rng([seed, subject, 2]))
    texts = {column: f"{heart[column]:.5g}" for column in SYNTHETIC_COLUMNS}
    row = {"id": name, "split": split_of(name), **texts}
    return {"row": row, "heart": heart, "ecg_mv": ecg_mv, "phases": phases}


def simulate_row(seed, grid, spacing_mm, subject):
    """One synthetic subject as a cohort row, through the same cleaning as real files."""
    raw = simulate(seed, subject)
    ecg = clean_ecg(raw["ecg_mv"], 500)["ecg"]
    heart = center_heart(raw["phases"], grid, spacing_mm)
    return {"row": raw["row"], "ecg": ecg, "ed": heart["ed"], "es": heart["es"], "warnings": []}


XML = """<?xml version="1.0" encoding="ISO-8859-1"?>
<CardiologyXML><StripData><SampleRate units="Hz">500</SampleRate>
<Resolution units="uVperLsb">5</Resolution>
{}
</StripData></CardiologyXML>
"""


def write_demo(folder, subjects, seed=0):
    """The same synthetic subjects as raw files, ECGs in turn CardioSoft XML, WFDB .dat and .mat."""
    folder = Path(folder)
    free = not folder.exists() or not any(folder.iterdir())
    require(free, folder, "exists and is not empty; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    affine, unit = np.eye(4), SHORT_AXIS / np.linalg.norm(SHORT_AXIS, axis=1, keepdims=True)
    affine[:3, :3] = unit[::-1].T * STACK_MM[::-1]  # an oblique stack, stored as (x, y, z)
    rows = []
    for subject in range(subjects):
        raw = simulate(seed, subject)
        name, files = raw["row"]["id"], {}
        for phase in ("ed", "es", "mask"):
            volume = raw["phases"][phase].transpose(2, 1, 0).astype(np.int16)
            files[phase] = f"{name}_{phase}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(volume, affine), folder / files[phase])
        ecg_uv = np.round(raw["ecg_mv"] * 1000).astype("<i2")
        leads = list(zip(LEADS, ecg_uv, strict=True))
        if subject % 3 == 0:
            texts = [(lead, ",".join(map(str, samples // 5))) for lead, samples in leads]
            lines = [f'<WaveformData lead="{lead}">{text}</WaveformData>' for lead, text in texts]
            files["ecg"], text = f"{name}.xml", XML.format("\n".join(lines))
        else:
            end, offset = (("dat", 0), ("mat", 24))[subject % 3 - 1]
            matlab = np.array([30, *ecg_uv.shape, 0, 4], "<i4").tobytes() + b"val\0"  # MAT 4 header
            (folder / f"{name}.{end}").write_bytes(matlab[:offset] + ecg_uv.T.tobytes())
            form = f"{name}.{end} 16+{offset} 1000(0)/mV 16 0"
            lines = [f"{form} {samples[0]} 0 0 {lead}" for lead, samples in leads]
            text = "\n".join([f"{name} 12 500 {ecg_uv.shape[1]}", *lines, ""])
            files["ecg"] = f"{name}.hea"
        (folder / files["ecg"]).write_text(text)
        rows.append(raw["row"] | files)
    columns = ["id", "ed", "es", "mask", "ecg", *SYNTHETIC_COLUMNS]  # split: by the hash of the id
    write_csv(folder / "manifest.csv", columns, rows)


# ---------------------------------------------------------------- commands


def prepare(manifest, folder, workers=None, mains_hz=50, grid=GRID, spacing_mm=SPACING_MM):
    """Raw files named by a manifest -> cohort folder; bad rows are reported, the rest goes on.

    Without a folder every row is prepared in memory and only reported. Returns how many are bad.
    """
    table = read_manifest(manifest)
    task = partial(prepare_row, manifest, mains_hz, grid, spacing_mm)
    prepared = in_parallel(task, table["rows"], workers, "preparing" if folder else "checking")
    if folder:
        source = {"kind": "manifest", "manifest": str(manifest), "mains_hz": mains_hz}
        made = write_cohort(folder, prepared, table["columns"], grid, spacing_mm, source)
    else:
        made = collect(prepared, files={})
    lines = report(made["rejected"], made["warnings"])
    filled = {row["split"] for row in made["rows"]}
    empty = ", ".join(name for name in SPLITS if name not in filled)
    lines += [f"warning: no subject is left for {empty}; see the column split"] if empty else []
    why = "is ignored, as a column needs a name and numbers"
    lines += [f"column {name or '(unnamed)'} {why}" for name in table["ignored"]]
    print("\n".join(lines) or "nothing to report")
    print(f"{folder or manifest}: {len(made['rows'])} of {len(table['rows'])} rows are usable")
    return len(made["rejected"])


def report(rejected, warnings):
    """Lines that name each bad row, group the reasons, and tell what is suspicious."""
    told = "rejected {}: {}: {}".format
    lines = [told(printable(b["id"] or "(no id)"), b["file"], b["reason"]) for b in rejected]
    lines += [f"reasons: {summarize_rejected(rejected)}"] if len(lines) > 1 else []
    return lines + [f"warning: {text} ({n} subjects)" for text, n in warnings.most_common()]


def synthesize(folder, subjects, seed=0, workers=None, grid=GRID, spacing_mm=SPACING_MM):
    """A synthetic cohort folder; subject i depends on (seed, i) alone."""
    task = partial(simulate_row, seed, grid, spacing_mm)
    prepared = in_parallel(task, range(subjects), workers, "synthesizing")
    source = {"kind": "synthetic", "subjects": subjects, "seed": seed}
    write_cohort(folder, prepared, SYNTHETIC_COLUMNS, grid, spacing_mm, source)


def show(cohort, subject, out):
    """Draw one subject: the 12-lead ECG on paper (lines at 0.2 s, 0.5 mV) beside ED and ES."""
    from matplotlib.figure import Figure  # slow to import, needed only here

    why = f"has no subject {subject}; ids run like {cohort['ids'][0]}"
    found = np.flatnonzero(cohort["ids"] == subject)
    require(len(found) > 0, cohort["folder"], why)
    row = found[0]
    batch = read_batch(cohort, [row])
    figure = Figure(figsize=(11.5, 6.9), layout="constrained")
    axes = figure.subplot_mosaic([["ecg", "ed"], ["ecg", "es"]], width_ratios=(1.45, 1))
    paper, seconds = axes["ecg"], np.arange(ECG_SHAPE[1]) / SAMPLING_RATE_HZ
    traces = [(k, k // 3 * 625, 625, k % 3) for k in range(12)]  # four columns of 2.5 s
    for lead, start, length, line in [*traces, (1, 0, 2500, 3)]:  # then lead II in full
        part = slice(start, start + length)
        paper.plot(seconds[part], batch["ecg"][0, lead, part] - 3 * line, "k", lw=0.8)
        paper.text(seconds[start] + 0.05, 1.5 - 3 * line, LEADS[lead], weight="bold")
    paper.set_xticks(np.arange(0, 10.1, 0.2), minor=True)
    paper.set_yticks(np.arange(-11, 2.1, 0.5), minor=True)
    paper.grid(which="both", color="#f3c6c6", lw=0.5)
    paper.set(xlim=(0, 10), ylim=(-10.5, 2), xlabel="time (s)", ylabel="mV, rows 3 mV apart")
    values = ", ".join(f"{name} {column[row]:.3g}" for name, column in cohort["columns"].items())
    title = f"{subject}, {cohort['split'][row]}, {cohort['source']['kind']}\n{values}"
    figure.suptitle(title.replace("$", r"\$"), fontsize=8, wrap=True)  # $: formulas
    mm_z, mm_y, mm_x = cohort["spacing_mm"]
    for phase in ("ed", "es"):
        slices = list(batch[phase][0, 0].numpy())  # of (Y, X), four in a row without gaps
        slices += [np.zeros_like(slices[0])] * (-len(slices) % 4)
        picture = np.block([slices[k : k + 4] for k in range(0, len(slices), 4)])
        axes[phase].imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=mm_y / mm_x)
        axes[phase].set_title(f"{phase.upper()}, base to apex, {mm_z:g} mm apart")
        axes[phase].axis("off")
    figure.savefig(out, dpi=80, format="png")


def keep_memory():
    """Have glibc keep freed memory for the next step; other systems' allocators are left alone.

    Otherwise each step returns its activations to the system and has them zeroed and mapped anew:
    a quarter of the time on two cores. Images of a whole batch (over 8 MB) do go back at once, as
    they would leave holes in what is kept. The parameters are those of `man 3 mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((-1, 2**31 - 1), (-3, 2**23), (-8, 1)):  # M_TRIM_THRESHOLD,
        mallopt(parameter, value)  # M_MMAP_THRESHOLD, M_ARENA_MAX: one heap for all threads


def exit_cleanly(main):
    """Run a command: one sentence and exit code 2 for the user's mistakes, 130 when interrupted."""
    code = 2
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show becomes ?
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        why = f"{error.strerror or error}; check the path, its permissions and the free space"
        print(f"error: {error.filename or 'output'}: {why}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def main():
    raw_text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw_text)
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("check", "prepare", "synthesize", "demo", "show")
    add = {name: commands.add_parser(name).add_argument for name in names}
    for name in ("check", "prepare"):
        add[name]("manifest")
        mains = "frequency to notch out, Hz; 0: none (default 50)"
        add[name]("--mains", type=int, choices=(50, 60, 0), default=50, help=mains)
    for name in names[1:]:
        add[name]("folder")
    for name, default in (("synthesize", 3000), ("demo", 12)):
        add[name]("--subjects", type=int, default=default, help=f"default {default}")
        add[name]("--seed", type=int, default=0, help="default 0")
    for name in ("check", "prepare", "synthesize"):
        zyx = {"nargs": 3, "metavar": ("Z", "Y", "X")}
        add[name]("--workers", type=int, help="processes (default: one a core)")
        add[name]("--grid", type=int, default=GRID, help="voxels (default 12 64 64)", **zyx)
        add[name]("--spacing", type=float, default=SPACING_MM, help="mm (default 10 3 3)", **zyx)
    add["show"]("--subject", required=True, help="id in subjects.csv")
    add["show"]("--out", default="subject.png", help="PNG to write (default subject.png)")
    args = parser.parse_args()
    for name, least in (("subjects", 1), ("workers", 1), ("seed", 0)):
        value = getattr(args, name, None)
        require(value is None or value >= least, f"--{name}", f"must be at least {least}")
    common = {}
    if "grid" in args:
        patch = (4, 8, 8)  # of models.cmr_encoder: a smaller grid would hold none
        fits = all(low <= n <= 512 for low, n in zip(patch, args.grid, strict=True))
        require(fits, "--grid", "must be from 4 x 8 x 8 to 512 x 512 x 512 voxels")
        valid = all(0.1 < mm < 100 for mm in args.spacing)
        require(valid, "--spacing", "must be from 0.1 to 100 mm along each axis")
        common = {"workers": args.workers, "grid": args.grid, "spacing_mm": args.spacing}
    if args.command == "check":
        return 2 if prepare(args.manifest, None, mains_hz=args.mains, **common) else 0
    if args.command == "prepare":
        require_file(args.manifest)  # before `alone` makes the folder above the cohort's
        with alone(args.folder):
            prepare(args.manifest, args.folder, mains_hz=args.mains, **common)
    elif args.command == "synthesize":
        with alone(args.folder):
            synthesize(args.folder, args.subjects, args.seed, **common)
    elif args.command == "demo":
        write_demo(args.folder, args.subjects, args.seed)
        print(f"wrote {Path(args.folder) / 'manifest.csv'} and the files that it names")
    else:
        show(open_cohort(args.folder), args.subject, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    exit_cleanly(main)
