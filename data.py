"""Data: raw ECG and CMR files, or synthetic hearts, become one cohort folder, read back in batches.

    python data.py check manifest.csv                            # validate every row, write nothing
    python data.py prepare manifest.csv cohort/                  # raw files -> cohort folder
    python data.py synthesize cohort/ --subjects 3000 --seed 0   # a synthetic cohort
    python data.py demo folder/ --subjects 12                    # the same hearts as raw files and a manifest
    python data.py show cohort/ --subject ID --out x.png         # one ECG beside its ED and ES slices

The file reads downwards in the order of the data: readers, cleaning, manifest, cohort, batches,
synthetic hearts, commands. Images are always (Z, Y, X): slice from base to apex, row, column.
"""
import argparse
import csv
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy import signal as dsp

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SAMPLING_RATE_HZ, SECONDS = 250, 10
GRID, SPACING_MM = (12, 64, 64), (10.0, 3.0, 3.0)  # 120 x 192 x 192 mm holds both ventricles
COVARIATES = ("age", "sex", "bmi")
FORMAT_VERSION = 1
LARGEST_ECG_BYTES, LARGEST_IMAGE_VOXELS = 20_000_000, 120_000_000

logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # its header repairs are our error messages


class InputError(Exception):
    """The user's input is wrong: where (file, row or argument) and why, in one sentence."""

    def __init__(self, where, why):
        super().__init__(where, why)
        self.where, self.why = str(where), why

    def __str__(self):
        return f"{self.where}: {self.why}"


# ---------------------------------------------------------------- reading ECGs

def read_ecg(path):
    """Read a 12-lead ECG. Returns dict(ecg_mv (12, T) millivolt in LEADS order, sampling_rate_hz)."""
    path = Path(path)
    readers = {".xml": read_cardiosoft, ".hea": read_wfdb}
    if path.suffix.lower() not in readers:
        raise InputError(path, "is neither CardioSoft .xml nor WFDB .hea; convert it to one of them")
    if path.stat().st_size > LARGEST_ECG_BYTES:
        raise InputError(path, "is larger than 20 MB, which no 12-lead rest ECG is; check the file")
    raw = readers[path.suffix.lower()](path)
    rate, leads = raw["sampling_rate_hz"], raw["leads"]
    names = Counter(name for name, _ in leads)
    wrong = [name for name in LEADS if names[name] != 1]
    if wrong:
        counts = ", ".join(f"{name} {names[name]} times" for name in wrong)
        raise InputError(path, f"must hold each of the 12 leads once but holds {counts}")
    if not 100 <= rate <= 10_000:
        raise InputError(path, f"sampling rate {rate:g} Hz is not between 100 and 10,000; correct it")
    lengths = {len(samples) for _, samples in leads}
    if len(lengths) > 1:
        raise InputError(path, f"has leads of different lengths {sorted(lengths)}; export it again")
    leads = dict(leads)
    return {"ecg_mv": np.stack([leads[name] for name in LEADS]), "sampling_rate_hz": rate}


def canonical_lead(name):
    """'avr', 'AVR ' -> 'aVR'; a name that is none of the 12 leads stays as it is."""
    return {lead.lower(): lead for lead in LEADS}.get((name or "").strip().lower(), name)


def read_cardiosoft(path):
    """GE CardioSoft XML (UK Biobank field 20205): the 10 s rhythm of StripData, never median beats."""
    content = path.read_bytes()
    if b"<!ENTITY" in content:
        raise InputError(path, "declares XML entities, which no ECG export needs; refused for safety")
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(path, f"is not readable XML ({error}); export it again") from None
    if root.tag != "CardiologyXML":
        raise InputError(path, f"is XML of another kind (<{root.tag}>), not CardioSoft <CardiologyXML>")
    strip = root.find(".//StripData")
    if strip is None:
        raise InputError(path, "has no StripData, the 10 s rhythm; export the full disclosure ECG again")
    numbers = {}
    for tag in ("SampleRate", "Resolution"):
        try:
            numbers[tag] = float(strip.findtext(tag))
        except (TypeError, ValueError):
            raise InputError(path, f"StripData has no numeric {tag}; export it again") from None
    if not 0.01 <= numbers["Resolution"] <= 100:
        raise InputError(path, f"Resolution {numbers['Resolution']:g} µV per LSB is not plausible")
    leads = []
    for block in strip.findall("WaveformData"):
        name = canonical_lead(block.get("lead"))
        try:
            samples = np.array([int(sample) for sample in (block.text or "").split(",")], np.int32)
        except (ValueError, OverflowError) as error:
            raise InputError(path, f"lead {name} holds a sample that is no integer ({error})") from None
        leads.append((name, samples * (numbers["Resolution"] / 1000)))
    return {"leads": leads, "sampling_rate_hz": numbers["SampleRate"]}


def read_wfdb(path):
    """WFDB header with format-16 signals in .dat or .mat (https://wfdb.io/spec/header-files.html)."""
    lines = [line.strip() for line in path.read_bytes().decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    try:
        record, count, rate = (lines[0].split() + ["250"])[:3]  # the standard's default rate
        count, rate = int(count), float(re.split("[/(]", rate)[0])
        length = int(lines[0].split()[3])
    except (IndexError, ValueError):
        raise InputError(path, "first line must give record, signals, rate and length") from None
    if "/" in record:
        raise InputError(path, "is a multi-segment record; join its segments into one first")
    if not 0 < count <= len(lines) - 1 or not 0 < length < 10_000_000:
        raise InputError(path, f"announces {count} signals of {length} samples but lists {len(lines) - 1}")
    pattern = re.compile(r"(\S+)\s+16(x1)?(:\d+)?(\+\d+)?\s+([-+.\deE]+)(\(([-+]?\d+)\))?(/(\S+))?(\s.*)?")
    signals = []
    for line in lines[1:count + 1]:
        match = pattern.fullmatch(line)
        if not match:
            raise InputError(path, f"signal line '{line[:60]}' is not of format 16; convert the record")
        name, _, _, offset, gain, _, baseline, _, unit, rest = match.groups()
        rest = (rest or "").split(maxsplit=5)  # resolution, zero, first value, checksum, block size, lead
        scale = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "v": 1e3}.get((unit or "mV").lower())
        if scale is None:
            raise InputError(path, f"unit '{unit}' is none of mV, uV, V; correct the header")
        try:
            gain, zero = float(gain), int(baseline or (rest[1] if len(rest) > 1 else 0))
        except ValueError:
            gain = 0.0
        if not (np.isfinite(gain) and gain > 0):
            raise InputError(path, f"gain in '{line[:60]}' is not a positive number; correct the header")
        lead = canonical_lead(rest[5] if len(rest) > 5 else None)
        signals.append((name, int(offset or 0), lead, zero, scale / gain))
    leads = []
    for name in dict.fromkeys(entry[0] for entry in signals):
        own = [entry for entry in signals if entry[0] == name]
        source = path.parent / name
        if Path(name).name != name or source.is_symlink():
            raise InputError(path, f"signal file '{name}' lies outside the header's folder; move it there")
        if not source.is_file():
            raise InputError(path, f"signal file '{name}' is missing; put it beside the header")
        samples = np.fromfile(source, "<i2", count=length * len(own), offset=own[0][1])
        if len(samples) < length * len(own):
            raise InputError(source, f"ends before the {length} samples its header announces")
        samples = samples.reshape(length, len(own)).T.astype(np.float64)
        samples[samples == -32768] = np.nan  # the standard's mark of a missing sample
        leads += [(lead, (row - zero) * scale)
                  for row, (_, _, lead, zero, scale) in zip(samples, own, strict=True)]
    return {"leads": [entry for entry in leads if entry[0] in LEADS], "sampling_rate_hz": rate}


def clean_ecg(ecg_mv, sampling_rate_hz, mains_hz=50):
    """Millivolt (12, T) at any rate -> int16 microvolt (12, 2500) at 250 Hz, zero-phase filtered.

    High-pass 0.5 Hz against baseline wander, notch at mains_hz (0: none), the middle 10 s. There is
    no z-score: voltage carries the mass of the heart. Returns dict(ecg, warnings); raises ValueError.
    """
    if not np.isfinite(ecg_mv).all():
        raise ValueError("holds missing or non-finite samples; leave this recording out")
    if ecg_mv.shape[1] < SECONDS * sampling_rate_hz - 1:
        raise ValueError(f"lasts {ecg_mv.shape[1] / sampling_rate_hz:.2f} s but 10 s are needed")
    flat = [name for name, lead in zip(LEADS, ecg_mv, strict=True) if np.ptp(lead) < 0.01]
    if flat:
        raise ValueError(f"lead {', '.join(flat)} is flat (below 0.01 mV); leave this recording out")
    ratio = Fraction(SAMPLING_RATE_HZ / sampling_rate_hz).limit_denominator(1000)
    ecg_mv = ecg_mv - np.median(ecg_mv, axis=1, keepdims=True)
    if ratio != 1:
        ecg_mv = dsp.resample_poly(ecg_mv, ratio.numerator, ratio.denominator, axis=1)
    ecg_mv = dsp.sosfiltfilt(ecg_filter(mains_hz), ecg_mv, axis=1, padlen=2 * SAMPLING_RATE_HZ)
    samples = SECONDS * SAMPLING_RATE_HZ
    if ecg_mv.shape[1] < samples:  # resampling 10 s may lose the last sample
        ecg_mv = np.pad(ecg_mv, ((0, 0), (0, samples - ecg_mv.shape[1])), mode="edge")
    start = (ecg_mv.shape[1] - samples) // 2
    ecg_mv = ecg_mv[:, start:start + samples]
    peak, residual = np.abs(ecg_mv).max(), limb_lead_residual(ecg_mv)
    if peak > 20:
        raise ValueError(f"reaches {peak:.0f} mV, which no heart does; check gain and unit")
    if residual > 0.2:
        raise ValueError(f"limb leads contradict Einthoven and Goldberger (residual {residual:.0%}); "
                         "check for exchanged or inverted leads")
    warnings = []
    if peak > 6 or np.ptp(ecg_mv, axis=1).max() < 0.3:
        warnings.append("ECG amplitude is outside the usual 0.3 to 6 mV")
    if residual > 0.05:
        warnings.append("limb leads agree only roughly with Einthoven and Goldberger")
    return {"ecg": np.round(ecg_mv.clip(-10, 10) * 1000).astype(np.int16), "warnings": warnings}


@lru_cache
def ecg_filter(mains_hz):
    """Second-order sections: Butterworth high-pass 0.5 Hz and, unless 0, a notch at mains_hz."""
    sections = dsp.butter(2, 0.5, "highpass", fs=SAMPLING_RATE_HZ, output="sos")
    if mains_hz:
        notch = dsp.tf2sos(*dsp.iirnotch(mains_hz, 30, fs=SAMPLING_RATE_HZ))
        sections = np.concatenate([sections, notch])
    return sections


def limb_lead_residual(ecg_mv):
    """Largest RMS of III, aVR, aVL, aVF minus their value from I and II, over the limb leads' RMS.

    Einthoven: II = I + III. Goldberger: aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2.
    """
    from_i_ii = np.array([[-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]]) @ ecg_mv[:2]
    error = np.sqrt(np.square(ecg_mv[2:6] - from_i_ii).mean(axis=1)).max()
    return error / np.sqrt(np.square(ecg_mv[:6]).mean())


# ---------------------------------------------------------------- reading CMR

# Where slices, rows and columns of a short-axis stack point in the patient (right, anterior,
# superior): base to apex, anterior wall to inferior wall, septum to lateral wall.
SHORT_AXIS = np.array([[-0.61, 0.61, -0.51], [0.36, -0.36, -0.86], [-0.71, -0.71, 0.0]])


def open_nifti(path, dimensions=(3,)):
    """Open a short-axis NIfTI without reading its voxels and check what its header announces.

    Returns dict(path, image, axes, flips, spacing_mm (z, y, x), affine or None); `arrange` turns an
    array of the file into (Z, Y, X). The slice axis is the one with the thickest voxels. Where the
    affine is sane (its columns are as long as the voxels), axes are flipped so that every stack runs
    in the same anatomical direction; nothing is ever mirrored otherwise.
    """
    try:
        image = nibabel.load(path)
        with nibabel.openers.ImageOpener(path) as file:  # as written: nibabel repairs a zero spacing
            spacing = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4].astype(float)
    except Exception as error:
        raise InputError(path, f"is not a readable NIfTI file ({str(error)[:80]})") from None
    shape = image.shape[:3] if len(image.shape) == 4 and image.shape[3] == 1 else image.shape
    if len(shape) not in dimensions:
        wanted = " or ".join(f"{n}D" for n in dimensions)
        raise InputError(path, f"is {len(shape)}D {shape} but {wanted} is needed; see cine in the README")
    if np.prod([float(n) for n in shape]) > LARGEST_IMAGE_VOXELS or min(shape) < 1:
        raise InputError(path, f"announces an impossible size {shape}; convert it again")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(path, f"holds {image.get_data_dtype()} voxels, not grey levels")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(path, f"voxel spacing {spacing.tolist()} mm is not positive; correct the header")
    thick = 2 - int(np.argmax(spacing[::-1]))  # the last of equals
    axes = [thick] + [axis for axis in (2, 1, 0) if axis != thick]
    if shape[thick] < 3 or min(shape[axis] for axis in axes[1:]) < 16:
        raise InputError(path, f"has {shape[thick]} slices of {[shape[a] for a in axes[1:]]} pixels; "
                               "a short-axis stack needs at least 3 of 16 x 16")
    affine, flips = np.array(image.affine, float), [1, 1, 1]
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.isfinite(affine).all() and np.allclose(lengths, spacing, rtol=0.02):
        affine = affine[:, axes + [3]]
        flips = [1 if affine[:3, k] @ SHORT_AXIS[k] >= 0 else -1 for k in range(3)]
        for k in range(3):
            if flips[k] < 0:  # the origin moves to the other end of a flipped axis
                affine[:, 3] += affine[:, k] * (shape[axes[k]] - 1)
                affine[:, k] *= -1
    else:
        affine = None
    return {"path": path, "image": image, "axes": axes, "flips": flips, "spacing_mm": spacing[axes],
            "affine": affine}


def arrange(voxels, nifti):
    """(i, j, k[, T]) as stored -> (Z, Y, X[, T]) as described in open_nifti."""
    order = nifti["axes"] + list(range(3, voxels.ndim))
    return voxels.transpose(order)[tuple(slice(None, None, flip) for flip in nifti["flips"])]


def read_voxels(nifti):
    """All voxels of an opened NIfTI as float32 (Z, Y, X[, T]) in scanner units."""
    path = nifti["path"]
    try:
        voxels = np.asarray(nifti["image"].dataobj, np.float32)  # get_fdata: float64 and cached
    except Exception as error:
        raise InputError(path, f"breaks off or cannot be decoded ({str(error)[:80]})") from None
    voxels = arrange(voxels, nifti)
    if not np.isfinite(voxels).all():
        raise InputError(path, "holds NaN or infinite voxels; convert it again")
    return voxels[..., 0] if voxels.ndim == 4 and voxels.shape[3] == 1 else voxels


def read_phases(row):
    """The two phases of a manifest row: dict(ed, es (Z, Y, X) float32, spacing_mm, mask, warnings)."""
    warnings, mask = [], None
    if row.get("cine"):
        stack = open_nifti(row["cine"], dimensions=(4,))
        frames = read_voxels(stack)  # (Z, Y, X, T)
        numbers = {}
        for key in ("ed_frame", "es_frame"):
            if row.get(key):
                numbers[key] = int(row[key]) if row[key].isdigit() else -1
                if not 0 <= numbers[key] < frames.shape[3]:
                    raise InputError(row["cine"], f"{key} '{row[key]}' is not a frame number from 0 to "
                                                  f"{frames.shape[3] - 1}; correct the manifest")
        ed = frames[..., numbers.get("ed_frame", 0)]
        if "es_frame" not in numbers:
            numbers["es_frame"] = estimate_es_frame(frames, ed, stack["spacing_mm"])
            warnings.append("ES frame was estimated from the images")
        es = frames[..., numbers["es_frame"]]
    else:
        stack, other = open_nifti(row["ed"]), open_nifti(row["es"])
        ed, es = read_voxels(stack), read_voxels(other)
        alike = ed.shape == es.shape and np.allclose(stack["spacing_mm"], other["spacing_mm"], rtol=1e-3)
        placed = stack["affine"] is not None and other["affine"] is not None
        if placed and not (alike and np.allclose(stack["affine"], other["affine"], atol=0.1)):
            to_es = np.linalg.inv(other["affine"]) @ stack["affine"]  # ED voxel -> ES voxel
            es = ndimage.affine_transform(es, to_es[:3, :3], to_es[:3, 3], ed.shape, order=1)
        elif not alike:
            raise InputError(row["es"], f"its grid {es.shape} differs from ED's {ed.shape} and the affines "
                                        "do not place both in the scanner; resample one onto the other")
    where = row.get("cine") or row["es"]
    if np.ptp(ed) == 0 or np.ptp(es) == 0:
        raise InputError(where, "a phase is one constant grey level; convert it again")
    if np.array_equal(ed, es):
        raise InputError(where, "ED and ES are the same image; name two different phases")
    if row.get("mask"):
        labels = open_nifti(row["mask"])
        if labels["image"].shape[:3] != stack["image"].shape[:3]:
            raise InputError(row["mask"], f"its grid {labels['image'].shape} is not ED's; use ED's label map")
        mask = read_voxels({**labels, "axes": stack["axes"], "flips": stack["flips"]}) > 0
        if not mask.any():
            raise InputError(row["mask"], "labels no voxel; leave the cell empty or segment the heart")
    spacing = stack["spacing_mm"]
    if not (4 <= spacing[0] <= 15 and 0.5 <= spacing[1] <= 4 and 0.5 <= spacing[2] <= 4):
        warnings.append("voxel spacing is unusual (expected 4-15 mm between slices, 0.5-4 mm in plane)")
    return {"ed": ed, "es": es, "spacing_mm": spacing, "mask": mask, "warnings": warnings}


def motion_box(ed, es, spacing_mm):
    """Bounding box (3, 2) in voxels of where ED and ES differ, i.e. of the beating heart.

    In plane: |ED - ES| averaged over slices, smoothed 6 mm, weighted by a 70 mm prior on the image
    centre, above 0.3 of its peak, the component that holds the peak. Along z: the whole stack.
    """
    motion = np.abs(ed - es).mean(axis=0)  # (Y, X)
    motion = ndimage.gaussian_filter(motion, [6 / mm for mm in spacing_mm[1:]])
    y, x = ((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(motion.shape, spacing_mm[1:], strict=True))
    motion = motion * np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 70**2))
    parts, _ = ndimage.label(motion > 0.3 * motion.max())
    heart = parts == parts[np.unravel_index(motion.argmax(), motion.shape)]
    rows, columns = np.nonzero(heart.any(axis=1))[0], np.nonzero(heart.any(axis=0))[0]
    return np.array([[0, len(ed) - 1], rows[[0, -1]], columns[[0, -1]]])


def blood_pool(volume, box, threshold):
    """Fraction of bright voxels in a heart's bounding box: follows the ventricles' blood volume."""
    heart = volume[tuple(slice(low, high + 1) for low, high in box)]
    return float((heart > threshold).mean())


def estimate_es_frame(frames, ed, spacing_mm):
    """Frame of (Z, Y, X, T) with the least blood in the region that moves over the cycle."""
    box = motion_box(frames.max(axis=3), frames.min(axis=3), spacing_mm)
    middle = np.percentile(ed, [1, 99]).mean()
    blood = [blood_pool(frames[..., t], box, middle) for t in range(frames.shape[3])]
    return int(np.argmin(blood))


def sampling_weights(size, spacing_mm, first_mm, new_size, new_spacing_mm):
    """Weights (new_size, size) that resample one axis; first_mm: place of the first new sample.

    A triangle as wide as the coarser of the two spacings: linear interpolation when refining, an
    anti-aliasing average when coarsening. Sums, hence volumes in ml, are kept; outside is zero.
    """
    step = max(1.0, new_spacing_mm / spacing_mm)
    places = (first_mm + np.arange(new_size) * new_spacing_mm) / spacing_mm
    margin = int(np.ceil(step))
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(-margin, size + margin)) / step)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-6)  # as if the stack went on
    return weights[:, margin:margin + size].astype(np.float32)


def box_weights(shape, spacing_mm, center, grid, grid_spacing_mm):
    """One (new, old) weight matrix per axis for a box of `grid` voxels around voxel `center`.

    The first new sample is put on an old one (at most half a voxel away), so that a stack that
    already has the grid's spacing is cropped without any blur.
    """
    return [sampling_weights(n, mm, round(c - (m - 1) / 2 * new / mm) * mm, m, new)
            for n, mm, c, m, new in zip(shape, spacing_mm, center, grid, grid_spacing_mm, strict=True)]


def resample(volume, weights):
    """(Z, Y, X) -> grid, one matrix product per axis."""
    volume = weights[1] @ (volume @ weights[2].T)  # (Z, Y, X) -> (Z, Y, x) -> (Z, y, x)
    return np.tensordot(weights[0], volume, axes=1)  # (z, y, x)


def center_heart(phases, grid=GRID, grid_spacing_mm=SPACING_MM):
    """One box and one intensity window for both phases: a box each would normalise contraction away.

    Returns dict(ed, es uint8 (Z, Y, X), weights, warnings).
    """
    ed, es, spacing = phases["ed"], phases["es"], phases["spacing_mm"]
    if phases["mask"] is not None:
        extent = [np.nonzero(phases["mask"].any(axis=other))[0][[0, -1]]
                  for other in ((1, 2), (0, 2), (0, 1))]
        box = np.array(extent)
    else:
        box = motion_box(ed, es, spacing)
    weights = box_weights(ed.shape, spacing, box.mean(axis=1), grid, grid_spacing_mm)
    inside = np.ix_(*(axis.sum(axis=1) > 0.5 for axis in weights))  # not the margin beyond the stack
    new_ed, new_es = resample(ed, weights), resample(es, weights)
    low, high = np.percentile(np.stack([new_ed[inside], new_es[inside]]), [1, 99])
    if not high > low:
        raise ValueError("shows one constant grey level around the heart; check the image or its mask")
    warnings = list(phases["warnings"])
    if (np.ptp(box, axis=1)[1:] * spacing[1:] > 0.9 * np.multiply(grid, grid_spacing_mm)[1:]).any():
        warnings.append("the heart touches the border of the box")
    if blood_pool(es, box, (low + high) / 2) > blood_pool(ed, box, (low + high) / 2):
        warnings.append("ES seems to hold more blood than ED; check that the phases are not exchanged")
    ed, es = (np.round(((phase - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)
              for phase in (new_ed, new_es))
    return {"ed": ed, "es": es, "weights": weights, "warnings": warnings}


# ---------------------------------------------------------------- manifest

def read_table(path, required):
    """Read a CSV (comma or ';', UTF-8, BOM allowed) as a list of dicts, each with its line number.

    A row that breaks a rule carries its reason under 'wrong', so that the rest can go on.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); give the path of a CSV file") from None
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 (byte {error.start}); save it as 'CSV UTF-8'") from None
    head = text.split("\n", 1)[0]
    lines = csv.reader(text.splitlines(), delimiter=";" if head.count(";") > head.count(",") else ",")
    try:
        rows = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(line)]
    except csv.Error as error:
        raise InputError(path, f"line {lines.line_num} is not CSV ({error})") from None
    columns = rows[0][1] if rows else []
    missing = [name for name in required if name not in columns]
    if missing or len(set(columns)) < len(columns):
        fault = f"has no column {', '.join(missing)}" if missing else "names a column twice"
        raise InputError(path, f"{fault}; its header is {','.join(columns) or 'empty'}")
    if len(rows) < 2:
        raise InputError(path, "has a header but no rows; add one row a subject")
    table, seen = [], {}
    for line, cells in rows[1:]:
        row = dict(zip(columns, cells, strict=False)) | {"line": line}
        if len(cells) != len(columns):
            row["wrong"] = f"line {line} has {len(cells)} cells but the header {len(columns)}"
        elif not row["id"]:
            row["wrong"] = f"line {line} has an empty id; give each subject one"
        elif row["id"] in seen:
            row["wrong"] = f"id stands in line {seen[row['id']]} already; keep one row a subject"
        seen.setdefault(row.get("id"), line)
        table.append(row)
    return table


def number(text):
    """Text -> float; nan for an empty cell and None for text that is no finite number."""
    try:
        value = float(text) if text else np.nan
    except ValueError:
        return None
    return None if np.isinf(value) else value


def read_manifest(path):
    """Read and check a manifest. Returns dict(rows, columns, ignored): columns are those kept."""
    rows = read_table(path, ("id", "ecg"))
    files = [name for name in ("ecg", "ed", "es", "cine", "mask") if name in rows[0]]
    if not ({"ed", "es"} <= set(files) or "cine" in files):
        raise InputError(path, "has neither columns ed and es nor a column cine; add the CMR files")
    plain = [name for name in rows[0]
             if name not in (*files, "id", "line", "split", "wrong", "ed_frame", "es_frame")]
    texts = [name for name in plain if name not in COVARIATES
             and all(number(row.get(name, "")) is None for row in rows if row.get(name))]
    columns = [name for name in plain if name not in texts]
    folder = Path(path).parent
    for row in rows:
        if "wrong" in row:
            continue
        bad = [name for name in columns if number(row[name]) is None]
        if bad:
            row["wrong"] = f"{bad[0]} '{row[bad[0]]}' is not a number; correct or empty the cell"
        elif row.get("sex") and number(row["sex"]) not in (0, 1):
            row["wrong"] = f"sex '{row['sex']}' is neither 0 (female) nor 1 (male); recode it"
        elif "split" in row and row["split"] not in ("train", "val", "test"):
            row["wrong"] = f"split '{row['split']}' is none of train, val, test; correct it"
        elif not row["ecg"] or not (row.get("cine") or (row.get("ed") and row.get("es"))):
            row["wrong"] = "names no ECG or no pair of ED and ES (or cine); fill the cells"
        row.update({name: str(folder / row[name]) for name in files if row.get(name)})
        row.setdefault("split", split_of(row["id"]))
    return {"rows": rows, "columns": columns, "ignored": texts}


def split_of(subject):
    """70/15/15 train, val, test by a hash of the id: no other row can move a subject."""
    place = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:4], "big") / 2**32
    return "train" if place < 0.70 else "val" if place < 0.85 else "test"


def prepare_row(row, mains_hz, grid, spacing_mm):
    """One manifest row -> one cohort row, or the reason why not. Never raises: others must go on."""
    try:
        if "wrong" in row:
            raise InputError("manifest", row["wrong"])
        for name in ("ecg", "ed", "es", "cine", "mask"):
            if row.get(name) and not Path(row[name]).is_file():
                raise InputError(row[name], f"{name} is a folder" if Path(row[name]).is_dir() else
                                 f"{name} file does not exist; correct the path in the manifest")
        ecg, phases = read_clean_ecg(row["ecg"], mains_hz), read_phases(row)
        try:
            heart = center_heart(phases, grid, spacing_mm)
        except ValueError as error:
            raise InputError(row.get("cine") or row["ed"], str(error)) from None
    except InputError as error:
        return {"id": row.get("id", ""), "file": error.where, "reason": error.why}
    except Exception as error:  # a file that breaks a reader must not stop the other 34,000
        return {"id": row["id"], "file": row["ecg"], "reason": f"unreadable ({type(error).__name__}: {error})"}
    return {"row": row, "ecg": ecg["ecg"], "ed": heart["ed"], "es": heart["es"],
            "warnings": ecg["warnings"] + heart["warnings"]}


def read_clean_ecg(path, mains_hz=50):
    """Read and clean one ECG file: dict(ecg int16 (12, 2500) microvolt, warnings)."""
    ecg = read_ecg(path)
    try:
        return clean_ecg(ecg["ecg_mv"], ecg["sampling_rate_hz"], mains_hz)
    except ValueError as error:
        raise InputError(path, str(error)) from None


def in_parallel(function, tasks, workers, what):
    """Yield function(task) in order from several processes, with rate and time left on stderr."""
    started, shown = time.time(), 0.0
    workers = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    pool = ProcessPoolExecutor(workers, initializer=signal.signal,
                               initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        for done, result in enumerate(pool.map(function, tasks, chunksize=8), start=1):
            yield result
            if time.time() - shown > (0.5 if sys.stderr.isatty() else 10) or done == len(tasks):
                shown = time.time()
                rate = done / (shown - started)
                print(f"{what}: {done}/{len(tasks)} subjects, {rate:.0f}/s, "
                      f"{(len(tasks) - done) / rate:.0f} s left", file=sys.stderr,
                      end="\r" if sys.stderr.isatty() and done < len(tasks) else "\n")
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- cohort folder

def write_cohort(folder, prepared, columns, grid, spacing_mm, source):
    """Write prepared subjects as they come: aside first, renamed when complete.

    prepared: iterable of dict(ecg, ed, es, warnings, row) or dict(id, file, reason). Memory does not
    grow with their number. Returns dict(counts, warnings (Counter), rejected (list)).
    """
    folder = Path(os.path.abspath(folder))
    aside, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    if folder.exists() and not (folder / "cohort.json").is_file() and any(folder.iterdir()):
        raise InputError(folder, "exists and is no cohort; choose another name")
    for leftover in (aside, old):
        if leftover.exists():
            print(f"removing {leftover}, left by an interrupted run", file=sys.stderr)
            shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    shapes = {"ecg": (len(LEADS), SECONDS * SAMPLING_RATE_HZ), "ed": tuple(grid), "es": tuple(grid)}
    rows, rejected, warnings = [], [], Counter()
    try:
        files = {name: open(aside / f"{name}.npy", "wb") for name in shapes}

        def write_header(name):  # numpy leaves room for the number of rows to grow
            dtype = "<i2" if name == "ecg" else "|u1"
            files[name].seek(0)
            np.lib.format.write_array_header_1_0(files[name], {
                "descr": dtype, "fortran_order": False, "shape": (len(rows), *shapes[name])})

        for name in shapes:
            write_header(name)
        for subject in prepared:
            if "reason" in subject:
                rejected.append(subject)
                continue
            for name in shapes:
                files[name].write(subject[name].tobytes())
            rows.append(subject["row"])
            warnings.update(subject["warnings"])
        for name in shapes:
            write_header(name)
            files[name].close()
        if not rows:
            raise InputError(folder, f"not made: none of {len(rejected)} rows is usable; "
                                     + summarize_rejected(rejected))
        splits = Counter(row["split"] for row in rows)
        counts = {"subjects": len(rows), **{name: splits[name] for name in ("train", "val", "test")},
                  "rejected": len(rejected)}
        write_csv(aside / "subjects.csv", ["id", "split", *columns], rows)
        write_csv(aside / "rejected.csv", ["id", "file", "reason"], rejected)
        (aside / "cohort.json").write_text(json.dumps({
            "format_version": FORMAT_VERSION, "grid": list(grid), "spacing_mm": list(spacing_mm),
            "sampling_rate_hz": SAMPLING_RATE_HZ, "leads": LEADS, "source": source,
            "counts": counts}, indent=1))
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"counts": counts, "warnings": warnings, "rejected": rejected}


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def summarize_rejected(rejected):
    """Identical reasons grouped, most frequent first, each with one example file."""
    examples = {bad["reason"]: bad["file"] for bad in reversed(rejected)}
    counts = Counter(bad["reason"] for bad in rejected)
    return "; ".join(f"{n}x {reason} (e.g. {examples[reason]})" for reason, n in counts.most_common(5))


def open_cohort(folder):
    """Check a cohort folder and read everything but its arrays, which stay on disk.

    Returns dict(folder, ids, split (N,) str, columns {name: (N,) float}, covariates, phenotypes,
    outcomes (lists of names), grid, spacing_mm, source, fingerprint).
    """
    folder = Path(folder)
    try:
        text = (folder / "cohort.json").read_text()
        about = json.loads(text)
        version, grid = about["format_version"], tuple(about["grid"])
        spacing_mm, source = about["spacing_mm"], about["source"]
    except OSError:
        raise InputError(folder, "is no cohort folder (no cohort.json); see data.py prepare") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(folder / "cohort.json", "is damaged; prepare the cohort again") from None
    if version != FORMAT_VERSION:
        raise InputError(folder, f"has format {version}, this code reads {FORMAT_VERSION}; update the code")
    rows = read_table(folder / "subjects.csv", ("id", "split"))
    wrong = [row["wrong"] for row in rows if "wrong" in row]
    names = [name for name in rows[0] if name not in ("id", "split", "line")]
    columns = {name: np.array([number(row[name]) for row in rows], float) for name in names if not wrong}
    if wrong or any(row["split"] not in ("train", "val", "test") for row in rows):
        raise InputError(folder / "subjects.csv", f"{(wrong or ['an unknown split'])[0]}; prepare again")
    for name, shape in (("ecg", (len(LEADS), SECONDS * SAMPLING_RATE_HZ)), ("ed", grid), ("es", grid)):
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(path, f"is missing or damaged ({error}); prepare again") from None
        wanted = np.int16 if name == "ecg" else np.uint8
        if array.dtype != wanted or array.shape != (len(rows), *shape):
            raise InputError(path, f"is {array.dtype} {array.shape} but subjects.csv and cohort.json need "
                                   f"{np.dtype(wanted)} {(len(rows), *shape)}; prepare again")
    values = {name: set(np.unique(column[~np.isnan(column)])) for name, column in columns.items()}
    targets = [name for name in names if name not in COVARIATES and values[name]]
    outcomes = [name for name in targets if values[name] <= {0.0, 1.0}]
    digest = hashlib.sha256(text.encode() + (folder / "subjects.csv").read_bytes()).hexdigest()[:16]
    return {"folder": folder, "ids": [row["id"] for row in rows],
            "split": np.array([row["split"] for row in rows]), "columns": columns,
            "covariates": [name for name in COVARIATES if values.get(name)],
            "phenotypes": [name for name in targets if name not in outcomes], "outcomes": outcomes,
            "grid": grid, "spacing_mm": spacing_mm, "source": source, "fingerprint": digest}


def find_cohort(data=None):
    """What --data names -> opened cohort: a cohort folder, a manifest (prepared once), or nothing."""
    if data and Path(data).is_dir():
        return open_cohort(data)
    if data:
        manifest = read_manifest(data)
        state = hashlib.sha256(Path(data).read_bytes())
        for row in manifest["rows"]:
            for name in ("ecg", "ed", "es", "cine", "mask"):
                for file in [Path(row[name])] if row.get(name) else []:
                    parts = [file] + [file.with_suffix(end) for end in (".dat", ".mat") if name == "ecg"]
                    states = [part.stat() for part in parts if part.exists()]
                    state.update(str([(part.st_size, part.st_mtime_ns) for part in states]).encode())
        folder = Path("cohorts") / f"{Path(data).stem}-{state.hexdigest()[:8]}"
        if not folder.exists():
            prepare(data, folder)
    else:
        folder = Path("cohorts/synthetic-3000-0")
        if not folder.exists():
            synthesize(folder, subjects=3000, seed=0)
    return open_cohort(folder)


# ---------------------------------------------------------------- batches

def read_batch(cohort, rows, device="cpu", ecg_rows=None, names=("ecg", "ed", "es")):
    """Rows of a cohort -> dict(ecg (B, 12, 2500) mV, ed, es (B, 1, Z, Y, X) in 0..1), float32.

    ecg_rows: whose ECG to put beside each heart, for the negative control; default their own.

    Arrays are mapped afresh: pages touched for one batch leave resident memory with it. int16 and
    uint8 travel to the device, a quarter of the bytes of float32.
    """
    batch = {}
    for name in names:
        wanted = ecg_rows if name == "ecg" and ecg_rows is not None else rows
        array = np.load(cohort["folder"] / f"{name}.npy", mmap_mode="r")[wanted]
        tensor = torch.from_numpy(array).to(device, non_blocking=True)
        batch[name] = tensor.float().mul_(1e-3) if name == "ecg" else tensor[:, None].float().div_(255)
    return batch


def epoch_batches(rows, batch_size, seed, epoch):
    """Training rows in the order of this epoch, cut into whole batches; the rest waits its turn."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [order[k:k + batch_size] for k in range(0, len(rows) - batch_size + 1, batch_size)]


def read_ahead(load, tasks):
    """Yield load(task) in order, two tasks ahead on a thread, so that a step never waits for data."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for task in tasks:
            waiting.append(thread.submit(load, task))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@lru_cache
def noise_table(seed, device):
    return torch.randn(2**20, generator=torch.Generator().manual_seed(seed)).to(device)


def augment(batch, rows, seed, epoch):
    """Vary a batch as a repeated examination would. Every draw depends on (seed, epoch, subject) only.

    ECG: time shift, gain +-10 %, noise, baseline wander, lead dropout. CMR: shift, in-plane rotation,
    gain, offset and noise. Geometry is one draw for both phases, without mirror (the right ventricle
    has a side) and without scaling (size is the phenotype).
    """
    ecg, ed, es = batch["ecg"], batch["ed"], batch["es"]
    count, leads, samples = ecg.shape
    draws = np.stack([np.random.default_rng([seed, epoch, int(row)]).random(64) for row in rows])
    draws = torch.from_numpy(draws.astype(np.float32)).to(ecg.device)  # (B, 64) in 0..1
    column = iter(range(64))

    def uniform(low, high, n=1):  # (B, n)
        picked = draws[:, [next(column) for _ in range(n)]]
        return low + (high - low) * picked

    def add_noise(x, highest):  # a subject's piece of one fixed table, as drawing afresh is slow
        table = noise_table(seed, ecg.device)
        starts, sizes = uniform(0, 1)[:, 0].tolist(), uniform(0, highest)[:, 0].tolist()
        for one, start, size in zip(x, starts, sizes, strict=True):
            first = int(start * (len(table) - one.numel()))
            one.add_(table[first:first + one.numel()].view_as(one), alpha=size)

    shift = uniform(-0.5, 0.5) * SAMPLING_RATE_HZ  # up to half a second, around the end
    places = (torch.arange(samples, device=ecg.device) + shift.long()) % samples  # (B, T)
    ecg = ecg.gather(2, places[:, None].expand(-1, leads, -1))
    ecg *= uniform(0.9, 1.1)[:, None] * (uniform(0, 1, leads) > 0.03)[..., None]
    seconds = torch.arange(samples, device=ecg.device) / SAMPLING_RATE_HZ
    wander = torch.sin(2 * math.pi * (uniform(0.1, 0.5) * seconds + uniform(0, 1)))  # (B, T)
    ecg.addcmul_(uniform(-0.02, 0.02, leads)[..., None], wander[:, None])  # mV
    add_noise(ecg, 0.015)  # mV

    depth, height, width = ed.shape[2:]
    stack = torch.cat([ed, es], dim=2).flatten(1, 2)  # (B, 2Z, Y, X)
    angle, zero = uniform(-0.2, 0.2), torch.zeros(count, 1, device=ecg.device)  # radian
    move = uniform(-0.1, 0.1, 2)  # of half the box: up to 9.6 mm at the default grid
    turn = torch.stack([torch.cat([angle.cos(), -angle.sin() * height / width, move[:, :1]], 1),
                        torch.cat([angle.sin() * width / height, angle.cos(), move[:, 1:]], 1)], 1)
    places = F.affine_grid(turn, (count, 1, height, width), align_corners=False)
    stack = F.grid_sample(stack, places, align_corners=False)
    stack.mul_(uniform(0.85, 1.15)[..., None, None]).add_(uniform(-0.05, 0.05)[..., None, None])
    add_noise(stack, 0.04)
    ed, es = stack.view(count, 1, 2 * depth, height, width).split(depth, dim=2)
    return {"ecg": ecg, "ed": ed, "es": es}


# ---------------------------------------------------------------- synthetic hearts

STACK, STACK_MM = (12, 72, 72), (10.0, 3.0, 3.0)  # the simulated scanner's field of view
HEART = np.s_[:, 10:62, 10:62]  # the part of it that can hold the heart
# X (left), Y (foot), Z (back) of the heart vector -> I, II, V1..V6 (Dower 1980)
DOWER = np.array([[0.632, -0.235, 0.059], [0.235, 1.066, -0.132], [-0.515, 0.157, -0.917],
                  [0.044, 0.164, -1.387], [0.882, 0.098, -1.277], [1.213, 0.127, -0.601],
                  [1.125, 0.127, -0.086], [0.831, 0.076, 0.230]])


SYNTHETIC_COLUMNS = ["age", "sex", "bmi", "LVEDV_ml", "LVESV_ml", "LVSV_ml", "LVEF_pct", "LVM_g", "RVEDV_ml",
                     "RVESV_ml", "RVEF_pct", "heart_failure", "atrial_fibrillation", "hypertension"]


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
    lvm = (67, 98)[sex] * size * np.exp(0.4 * dilation + hypertrophy + 0.12 * failing + 0.10 * normal())
    rvef = np.clip((58.0, 54.5)[sex] + 5.8 * normal() + 0.25 * (lvef - 60), 20, 78)
    rvedv = lvsv * np.exp(0.08 * normal()) / (rvef / 100)
    heart_rate = np.clip(2900 * surface_m2 * np.exp(0.14 * normal()) / lvsv, 40, 115)
    depth_mm = 30 + 0.9 * (bmi - 26.5) + 7 * normal()  # from the chest wall to the heart
    turn_deg, tilt = 12 * normal(), 0.10 * normal()  # of the heart in the chest
    # Outcomes: a noisy logistic of the state, prevalence about 6, 9 and 30 %.
    logits = {"heart_failure": -3.6 + 0.14 * (59 - lvef) + 0.05 * (age - 64),
              "atrial_fibrillation": -2.7 + 0.07 * (age - 64) + 0.04 * (59 - lvef) + 2 * dilation,
              "hypertension": -1.2 + 5 * hypertrophy + 0.05 * (age - 64) + 0.08 * (bmi - 26)}
    events = {name: int(uniform() < 1 / (1 + np.exp(-logit))) for name, logit in logits.items()}
    return {"age": age, "sex": sex, "bmi": bmi, "LVEDV_ml": lvedv, "LVESV_ml": lvedv - lvsv,
            "LVSV_ml": lvsv, "LVEF_pct": lvef, "LVM_g": lvm, "RVEDV_ml": rvedv,
            "RVESV_ml": rvedv * (1 - rvef / 100), "RVEF_pct": rvef, **events,
            "surface_m2": surface_m2, "heart_rate_bpm": heart_rate, "depth_mm": depth_mm,
            "turn_deg": turn_deg, "tilt": tilt}


def simulate_ecg(heart, rng):
    """12-lead ECG (12, 5000) in mV at 500 Hz with 5 uV resolution, as a recorder would store it.

    P, Q, R, S, T are Gaussians in time on a heart vector (McSharry 2003; Sameni 2007), projected by
    the Dower matrix. Planted links: mass -> QRS voltage and axis; dilatation and low EF -> QRS
    duration, initial forces, QT; strain -> T amplitude and angle; RV -> terminal forces; stroke
    volume -> heart rate; depth, turn and tilt of the heart in the chest, which CMR shows too ->
    gain of the chest leads and electrical axis. Nuisance: gain, axes, noise, baseline wander, mains, RR variability.
    """
    normal, rate = rng.standard_normal, 500
    weak = 60 - heart["LVEF_pct"]
    mass_index = heart["LVM_g"] / heart["surface_m2"] / (42, 52)[heart["sex"]] - 1
    strain = 2.2 * mass_index + 0.065 * weak
    torso = np.exp(0.08 * normal() - 0.25 * np.log(heart["bmi"] / 26.5))
    qrs = torso * (heart["LVM_g"] / 85) ** 0.75 * np.exp(0.14 * normal())
    width = (90 + 5 * (heart["sex"] - 0.5) + 0.10 * (heart["LVEDV_ml"] - 145) + 0.42 * weak
             + 6 * normal()) / 90
    axis = np.deg2rad(45 - 0.5 * (heart["age"] - 64) - 1.2 * (heart["bmi"] - 26.5) - 8 * strain
                      + 0.8 * heart["turn_deg"] + 11 * normal())
    back = 0.25 + 0.008 * weak + 1.0 * heart["tilt"] + 0.12 * normal()
    t_axis = np.deg2rad(40 + 14 * strain + 12 * normal())
    t_wave = torso * (1, 1.15)[heart["sex"]] * np.exp(-0.22 * strain + 0.25 * normal())
    right = 0.5 * np.log(heart["RVEDV_ml"] / 150) + 0.012 * (56 - heart["RVEF_pct"]) + 0.16 * normal()
    rr_s = 60 / heart["heart_rate_bpm"]
    pr_s = (160 + 0.6 * (heart["age"] - 64) + 18 * normal()) / 1000
    qt_s = (412 - 14 * heart["sex"] + 0.9 * weak + 15 * normal()) / 1000 * np.sqrt(rr_s)  # Bazett
    waves = [  # centre (s after R), width (s), vector (left, foot, back) in mV
        (-pr_s + 0.02, 0.022, 0.11 * torso * np.exp(0.2 * normal()) * np.array([0.6, 0.8, -0.1])),
        (-0.024 * width, 0.008 * width, qrs * np.array([-0.14, 0.04, -0.34 + 0.008 * weak])),
        (0, 0.011 * width, 1.55 * qrs * np.array([np.cos(axis), np.sin(axis), back])),
        (0.026 * width, 0.010 * width, qrs * np.array([-0.20 - 0.5 * right, 0.02, 0.55])),
        (qt_s - 0.150, 0.048, 0.20 * t_wave * np.array([np.cos(t_axis), np.sin(t_axis), -0.55])),
        (qt_s - 0.095, 0.030, 0.30 * t_wave * np.array([np.cos(t_axis), np.sin(t_axis), -0.45]))]
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
    leads[2:] *= np.exp(-0.02 * (heart["depth_mm"] - 30) + 0.08 * normal())  # the chest leads are near the heart
    leads += 0.012 * normal(leads.shape)
    for size_mv, hertz in ((0.10, rng.uniform(0.1, 0.4)), (0.012, 50)):  # baseline wander, mains
        turn = 2 * np.pi * hertz * seconds
        leads += size_mv * normal((8, 2)) @ np.stack([np.sin(turn), np.cos(turn)])
    one, two = leads[0], leads[1]
    limb = np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2])
    return np.round(np.concatenate([limb, leads[2:]]) / 0.005) * 0.005


def phantom(heart, rng):
    """Geometry of a short-axis stack: {phase: {tissue: fraction of each voxel of STACK[HEART]}}.

    The LV cavity is an ellipsoid cut at the base, its volume EDV or ESV; the wall lies between it and
    a larger one, its volume mass / 1.05 g/ml at both phases, so that it thickens; the base descends;
    the RV is a crescent on the septal side. Fractions add up to the stated volumes.
    """
    normal, (mm_z, mm, _) = rng.standard_normal, STACK_MM
    length = 94 * (heart["LVEDV_ml"] / 140) ** (1 / 3) * np.exp(0.05 * normal())  # base to apex, mm
    length = min(length, 106)
    first_base = 56 - length / 2 + np.clip(normal(), -2, 2)  # mm below the top of the stack
    tilt, jitter, shift = np.array([heart["tilt"], 0.05 * normal()]), 1.0 * normal((STACK[0], 2)), np.array([0, 16]) + 4 * normal(2)
    septum = np.pi + np.deg2rad(heart["turn_deg"] + 5 * normal())  # direction of the RV: towards the left of the image
    slices = np.arange(STACK[0])
    axis = shift + (slices[:, None] - 5.5) * mm_z * tilt + jitter  # (Z, 2) place of the LV axis, mm
    y, x = ((np.arange(n)[part] - (n - 1) / 2) * mm for n, part in zip(STACK[1:], HEART[1:], strict=True))
    dy = (y - axis[:, :1])[:, :, None].astype(np.float32)  # (Z, Y, 1)
    dx = (x - axis[:, 1:])[:, None, :].astype(np.float32)  # (Z, 1, X)
    radius = np.sqrt(dy**2 + dx**2)  # (Z, Y, X) distance from the LV axis, mm

    def crescent(cosine):  # depth of the RV in each direction as a part of its depth at the septum
        return np.clip((cosine + 0.05) / 1.05, 0, 1) ** 0.8

    septal = dx * np.float32(np.cos(septum)) + dy * np.float32(np.sin(septum))
    reach = crescent(septal / np.maximum(radius, 1))
    angles = crescent(np.cos(np.linspace(-np.pi, np.pi, 720, endpoint=False)))

    def per_slice(values):
        return values.astype(np.float32)[:, None, None]  # (Z, 1, 1)

    def slabs(equator, top, a, c):  # of an ellipsoid: exact volume as mean radius and part of a slice
        faces = np.clip([slices * mm_z - equator, (slices + 1) * mm_z - equator], top, c)
        depth = np.maximum(np.diff(faces, axis=0)[0], 1e-9)
        square = np.diff(faces - faces**3 / (3 * c * c), axis=0)[0] * a * a / depth
        return per_slice(np.sqrt(square)), per_slice(depth / mm_z)

    def disc(edge):  # how much of each pixel lies within `edge` mm of the LV axis
        return np.clip((edge - radius) / mm + 0.5, 0, 1)

    phases = {}
    for phase, descent in (("ed", 0.0), ("es", 14 * heart["LVEF_pct"] / 60)):
        lv_mm3, rv_mm3 = (1000 * heart[f"{side}E{phase[1].upper()}V_ml"] for side in ("LV", "RV"))
        base, c = first_base + descent, (length - descent) / 1.25  # cut a quarter above the equator
        top, equator = -0.25 * c, base + 0.25 * c
        a = np.sqrt(lv_mm3 / (np.pi * c * (2 / 3 + 0.25 - 0.25**3 / 3)))
        thin, thick = 0.0, 60.0  # bisection on the wall's thickness; at the apex it is 0.6 of it
        for _ in range(30):
            wall = (thin + thick) / 2
            tip = c + 0.6 * wall
            whole = np.pi * (a + wall) ** 2 * (tip * 2 / 3 - top + top**3 / (3 * tip**2))
            thin, thick = (wall, thick) if whole < lv_mm3 + heart["LVM_g"] / 1.05e-3 else (thin, wall)
        inner, inner_part = slabs(equator, top, a, c)
        outer, outer_part = slabs(equator, top, a + wall, c + 0.6 * wall)
        faces = np.clip([slices * mm_z - base, (slices + 1) * mm_z - base], 0, 0.9 * (length - descent))
        above = np.diff(np.clip([slices * mm_z, (slices + 1) * mm_z], base - 30, base), axis=0)[0] / mm_z
        rv_part = per_slice(np.diff(faces, axis=0)[0] / mm_z)
        taper = per_slice(np.sqrt(1 - (faces.mean(axis=0) / (length - descent)) ** 2))
        # RV volume = linear * depth + square * depth^2, solved for the depth at the base
        linear = (rv_part * outer * taper).sum() * angles.mean() * 2 * np.pi * mm_z
        square = (rv_part * taper**2).sum() * (angles**2).mean() * np.pi * mm_z
        depth = float(np.sqrt(linear**2 + 4 * square * rv_mm3) - linear) / float(2 * square)
        free_wall = outer + depth * taper * reach
        cavity, heart_disc = inner_part * disc(inner), disc(outer)
        phases[phase] = {"lv": cavity, "myocardium": outer_part * heart_disc - cavity,
                         "rv": rv_part * (disc(free_wall) - heart_disc),
                         "rv_wall": rv_part * (disc(free_wall + (reach > 0) * np.float32(4)) - disc(free_wall)),
                         "fat": np.maximum(outer_part, rv_part) * (disc(free_wall + 7) - heart_disc),
                         "atria": per_slice(above) * disc(np.float32(18 if phase == "ed" else 23)),
                         "papillary": inner_part * np.clip((5 - np.sqrt(np.minimum(
                             (dy - 0.5 * inner) ** 2 + (dx + 0.3 * inner) ** 2,
                             (dy + 0.5 * inner) ** 2 + (dx - 0.2 * inner) ** 2))) / mm, 0, 1) * cavity}
    return phases


def simulate_cmr(heart, rng):
    """A scanner's view of the phantom: dict(ed, es int16 (Z, Y, X), mask uint8 at ED: 1 RV, 2 wall, 3 LV)."""
    tissues = phantom(heart, rng)
    y, x = (np.arange(n) * mm - (n - 1) / 2 * mm for n, mm in zip(STACK[1:], STACK_MM[1:], strict=True))
    y, x = y[:, None] + 3 * rng.standard_normal(), x + 4 * rng.standard_normal()

    def smooth(coarse):  # random field (5, 11, 11) at 30 x 24 x 24 mm -> (Z, Y, X)
        return resample(coarse.astype(np.float32), [
            sampling_weights(m, old, 0, n, mm)
            for m, old, n, mm in zip(coarse.shape, (30, 24, 24), STACK, STACK_MM, strict=True)])

    texture = 1 + 0.35 * smooth(rng.standard_normal((5, 11, 11)))
    body = np.full(STACK[1:], 0.10)  # lung, and in it:
    for cy, cx, reach_mm, level in ((120, -70, 100, 0.42), (115, 75, 75, 0.30), (62, 52, 11, 0.90)):
        body += (level - body) * np.clip((reach_mm - np.hypot(y - cy, x - cx)) / 8 + 0.5, 0, 1)
    for reach_mm, level in ((0, 0.60), (10 + 0.5 * heart["bmi"], 0.02)):  # ... chest wall, air
        reach_mm += 92 + heart["depth_mm"]
        body += (level - body) * np.clip((np.hypot(y - 35, x - 30) - reach_mm) / 8 + 0.5, 0, 1)
    bias = 1 + 0.25 * smooth(rng.standard_normal((5, 11, 11)).cumsum(axis=1) / 4)
    scale, sigma = float(260 * np.exp(0.25 * rng.standard_normal())), rng.uniform(0.02, 0.05)
    phases, grain = {}, (0.9 + 0.1 * texture)[HEART]
    for phase, parts in tissues.items():
        picture = body.astype(np.float32) * texture
        heart = picture[HEART]
        for tissue, level in (("atria", 0.80), ("fat", 0.42), ("rv_wall", 0.33), ("rv", 0.92), ("myocardium", 0.30),
                              ("lv", 1.0), ("papillary", 0.35)):
            heart += (level * grain - heart) * parts[tissue]
        noise = np.float32(sigma) * rng.standard_normal((2, *STACK), dtype=np.float32)
        rician = np.sqrt((picture * bias + noise[0]) ** 2 + noise[1] ** 2)
        phases[phase] = np.round(scale * rician).astype(np.int16)
    labels = np.zeros(STACK, np.uint8)
    for label, tissue in enumerate(("rv", "myocardium", "lv"), start=1):
        labels[HEART][tissues["ed"][tissue] > 0.5] = label
    return {**phases, "mask": labels}


def simulate(seed, subject):
    """One synthetic subject as raw data: dict(id, heart, ecg_mv (12, 5000) at 500 Hz, phases (as read_phases))."""
    heart = draw_heart(seed, subject)
    cmr = simulate_cmr(heart, np.random.default_rng([seed, subject, 1]))
    ecg = simulate_ecg(heart, np.random.default_rng([seed, subject, 2]))
    return {"id": f"{subject:06d}", "heart": heart, "ecg_mv": ecg,
            "phases": {"ed": cmr["ed"].astype(np.float32), "es": cmr["es"].astype(np.float32),
                       "spacing_mm": np.array(STACK_MM), "mask": cmr["mask"], "warnings": []}}


def simulate_row(seed, subject, grid, spacing_mm):
    """One synthetic subject as a cohort row, through the same cleaning as real files."""
    raw = simulate(seed, subject)
    row = {"id": raw["id"], "split": split_of(raw["id"]), **describe(raw["heart"])}
    ecg, heart = clean_ecg(raw["ecg_mv"], 500), center_heart(raw["phases"], grid, spacing_mm)
    return {"row": row, "ecg": ecg["ecg"], "ed": heart["ed"], "es": heart["es"], "warnings": []}


def describe(heart):
    """The columns of subjects.csv: covariates, phenotypes and outcomes as text."""
    return {name: f"{value:.5g}" for name, value in heart.items() if name in SYNTHETIC_COLUMNS}


def write_demo(folder, subjects, seed=0):
    """The same synthetic subjects as raw files, ECGs in turn as CardioSoft XML, WFDB .dat and .mat."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(folder, "exists and is not empty; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4)  # an oblique stack, stored as (x, y, z)
    affine[:3, :3] = (SHORT_AXIS / np.linalg.norm(SHORT_AXIS, axis=1, keepdims=True))[::-1].T * STACK_MM[::-1]
    rows = []
    for subject in range(subjects):
        raw = simulate(seed, subject)
        name, files = raw["id"], {}
        for phase in ("ed", "es", "mask"):
            volume = raw["phases"][phase]
            image = nibabel.Nifti1Image(volume.transpose(2, 1, 0).astype(np.int16), affine)
            image.header.set_xyzt_units("mm")
            files[phase] = f"{name}_{phase}.nii.gz"
            nibabel.save(image, folder / files[phase])
        ecg_uv = np.round(raw["ecg_mv"] * 1000).astype("<i2")
        files["ecg"] = f"{name}.hea" if subject % 3 else f"{name}.xml"
        if subject % 3 == 0:
            leads = "".join(f'<WaveformData lead="{lead}">{",".join(map(str, samples // 5))}</WaveformData>\n'
                            for lead, samples in zip(LEADS, ecg_uv, strict=True))
            (folder / files["ecg"]).write_text(
                '<?xml version="1.0" encoding="ISO-8859-1"?>\n<CardiologyXML><StripData>'
                '<SampleRate units="Hz">500</SampleRate><Resolution units="uVperLsb">5</Resolution>\n'
                f"{leads}</StripData></CardiologyXML>\n")
        else:
            end, offset = (("dat", 0), ("mat", 24))[subject % 3 - 1]
            matlab = struct.pack("<5i4s", 30, *ecg_uv.shape, 0, 4, b"val\\0")[:offset]  # MAT 4 header
            (folder / f"{name}.{end}").write_bytes(matlab + ecg_uv.T.tobytes())
            lines = [f"{name}.{end} 16+{offset} 1000(0)/mV 16 0 {lead_uv[0]} 0 0 {lead}"
                     for lead, lead_uv in zip(LEADS, ecg_uv, strict=True)]
            (folder / files["ecg"]).write_text("\n".join([f"{name} 12 500 {ecg_uv.shape[1]}", *lines, ""]))
        rows.append({"id": name, **files, **describe(raw["heart"])})
    write_csv(folder / "manifest.csv", list(rows[0]), rows)


# ---------------------------------------------------------------- commands

def prepare(manifest, folder, workers=None, mains_hz=50, grid=GRID, spacing_mm=SPACING_MM):
    """Raw files named by a manifest -> cohort folder; bad rows are reported, the rest goes on."""
    table = read_manifest(manifest)
    task = partial(prepare_row, mains_hz=mains_hz, grid=grid, spacing_mm=spacing_mm)
    prepared = in_parallel(task, table["rows"], workers, "preparing")
    source = {"kind": "manifest", "manifest": str(manifest), "mains_hz": mains_hz}
    result = write_cohort(folder, prepared, table["columns"], grid, spacing_mm, source)
    print(report(result, table["ignored"]) + f"\n{folder}: {result['counts']}")


def check(manifest, workers=None, mains_hz=50, grid=GRID, spacing_mm=SPACING_MM):
    """Prepare every row in memory and report it. Returns the number of bad rows."""
    table = read_manifest(manifest)
    task = partial(prepare_row, mains_hz=mains_hz, grid=grid, spacing_mm=spacing_mm)
    rejected, warnings = [], Counter()
    for subject in in_parallel(task, table["rows"], workers, "checking"):
        rejected += [subject] if "reason" in subject else []
        warnings.update(subject.get("warnings", []))
    print(report({"rejected": rejected, "warnings": warnings}, table["ignored"]))
    print(f"{manifest}: {len(table['rows']) - len(rejected)} of {len(table['rows'])} rows are usable")
    return len(rejected)


def report(result, ignored):
    lines = [f"rejected {bad['id']}: {bad['file']}: {bad['reason']}" for bad in result["rejected"]]
    if len(lines) > 1:
        lines.append(f"reasons: {summarize_rejected(result['rejected'])}")
    lines += [f"warning: {text} ({n} subjects)" for text, n in result["warnings"].most_common()]
    lines += [f"column {name} holds text and is ignored" for name in ignored]
    return "\n".join(lines)


def synthesize(folder, subjects, seed=0, workers=None, grid=GRID, spacing_mm=SPACING_MM):
    """A synthetic cohort folder; subject i depends on (seed, i) alone."""
    task = partial(simulate_row, seed, grid=grid, spacing_mm=spacing_mm)
    prepared = in_parallel(task, range(subjects), workers, "synthesizing")
    source = {"kind": "synthetic", "subjects": subjects, "seed": seed}
    write_cohort(folder, prepared, SYNTHETIC_COLUMNS, grid, spacing_mm, source)


def show(cohort, subject, out):
    """Draw one subject: the 12-lead ECG on paper (25 mm/s, 10 mm/mV) beside its ED and ES slices."""
    from matplotlib.figure import Figure  # slow to import, needed only here

    if subject not in cohort["ids"]:
        raise InputError(cohort["folder"], f"has no subject {subject}; ids run like {cohort['ids'][0]}")
    row = cohort["ids"].index(subject)
    batch = read_batch(cohort, [row])
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    axes = left.subplots()
    seconds = np.arange(SECONDS * SAMPLING_RATE_HZ) / SAMPLING_RATE_HZ
    for k, lead in enumerate(LEADS):  # four columns of 2.5 s, then lead II in full
        column, line = k // 3, k % 3
        part = (seconds >= 2.5 * column) & (seconds < 2.5 * column + 2.5)
        axes.plot(seconds[part], batch["ecg"][0, k, part] - 3 * line, "k", lw=0.7)
        axes.text(2.5 * column + 0.05, 0.9 - 3 * line, lead)
    axes.plot(seconds, batch["ecg"][0, 1] - 9, "k", lw=0.7)
    axes.text(0.05, -8.1, "II")
    axes.set_xticks(np.arange(0, 10.1, 0.2), minor=True)
    axes.set_yticks(np.arange(-11, 2.1, 0.5), minor=True)
    axes.grid(which="both", color="#f3c6c6", lw=0.5)
    axes.set(xlim=(0, 10), ylim=(-11, 2), xlabel="time (s)", ylabel="voltage (mV, 3 mV between rows)")
    values = ", ".join(f"{name} {column[row]:.3g}" for name, column in cohort["columns"].items())
    left.suptitle(f"{subject}, {cohort['split'][row]}, {cohort['source']['kind']}: {values}", fontsize=8,
                  wrap=True)
    for figure_half, phase in zip(right.subfigures(2, 1), ("ed", "es"), strict=True):
        volume = batch[phase][0, 0].numpy()  # (Z, Y, X)
        figure_half.suptitle(f"{phase.upper()}, base to apex, {cohort['spacing_mm'][0]:g} mm apart")
        for picture, axis in zip(volume, figure_half.subplots(2, math.ceil(len(volume) / 2)).flat):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1,
                        aspect=cohort["spacing_mm"][1] / cohort["spacing_mm"][2])
            axis.axis("off")
    figure.savefig(out, dpi=110, format="png")


def exit_cleanly(main):
    """Run a command: one sentence and exit code 2 for the user's mistakes, 130 when interrupted."""
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}; "
              "check the path, its permissions and the free space", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in ("check", "prepare", "synthesize", "demo", "show")}
    for name in ("check", "prepare"):
        add[name].add_argument("manifest")
        add[name].add_argument("--mains", type=int, choices=(50, 60, 0), default=50,
                               help="mains frequency to notch out, Hz; 0: none (default 50)")
    for name in ("prepare", "synthesize", "demo", "show"):
        add[name].add_argument("folder")
    for name, default in (("synthesize", 3000), ("demo", 12)):
        add[name].add_argument("--subjects", type=int, default=default, help=f"default {default}")
        add[name].add_argument("--seed", type=int, default=0, help="default 0")
    for name in ("check", "prepare", "synthesize"):
        add[name].add_argument("--workers", type=int, help="processes (default: one a core)")
        add[name].add_argument("--grid", type=int, nargs=3, default=GRID, metavar=("Z", "Y", "X"),
                               help="voxels (default 12 64 64)")
        add[name].add_argument("--spacing", type=float, nargs=3, default=SPACING_MM,
                               metavar=("z", "y", "x"), help="mm (default 10 3 3)")
    add["show"].add_argument("--subject", required=True, help="id in subjects.csv")
    add["show"].add_argument("--out", default="subject.png", help="PNG to write (default subject.png)")
    args = parser.parse_args()
    for name, least in (("subjects", 1), ("workers", 1), ("seed", 0)):
        if getattr(args, name, None) is not None and getattr(args, name) < least:
            raise InputError(f"--{name}", f"must be at least {least}")
    if "grid" in args and (min(args.grid) < 4 or not min(args.spacing) > 0):
        raise InputError("--grid, --spacing", "need at least 4 voxels and a positive size along each axis")
    if args.command == "check":
        bad = check(args.manifest, args.workers, args.mains, args.grid, args.spacing)
        return 2 if bad else 0
    if args.command == "prepare":
        prepare(args.manifest, args.folder, args.workers, args.mains, args.grid, args.spacing)
    elif args.command == "synthesize":
        synthesize(args.folder, args.subjects, args.seed, args.workers, args.grid, args.spacing)
    elif args.command == "demo":
        write_demo(args.folder, args.subjects, args.seed)
    else:
        show(open_cohort(args.folder), args.subject, args.out)


if __name__ == "__main__":
    exit_cleanly(main)
