"""Synthetic hearts: each is seen by a simulated ECG recorder and by a simulated CMR scanner.

    python synthetic.py cohort/ --subjects 3000 --seed 0     # a cohort folder
    python synthetic.py demo/ --raw --subjects 12            # the same hearts as raw files

    draw_heart ─► heart ─┬► simulate_ecg, by LINKS     ─► data.clean_ecg  ─┬► data.Subject
                         └► simulate_cmr, by geometry  ─► data.crop_heart ─┘

The heart is a dict of numbers. Neither simulator sees the other's output, so all that ECG and CMR
have in common is the heart.
"""

import argparse
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import scipy.io

import data

PHENOTYPES = "LVEDV_ml LVESV_ml LVSV_ml LVEF_pct LVM_g RVEDV_ml RVESV_ml RVEF_pct".split()
OUTCOMES = ["heart_failure", "atrial_fibrillation", "hypertension"]
COLUMNS = [*data.COVARIATES, *PHENOTYPES, *OUTCOMES]

# What the ECG tells of the heart: (cause, property of the ECG): strength. Units are in the names:
# ("age", "pr_ms"): 0.6 is 0.6 ms per year; with ln on both sides the strength is a power. A cause
# counts from its AVERAGE. Heart rate, which tells LVSV, is drawn with the heart. Strengths follow
# what is published of ECGs, never what a method reaches.
LINKS = {
    ("ln bmi", "ln voltage"): -0.25,  # of all waves; a large torso is between heart and skin
    ("ln LVM_g", "ln qrs_mv"): 0.75,
    ("sex", "qrs_ms"): 5.0,
    ("LVEDV_ml", "qrs_ms"): 0.10,
    ("LVEF_pct", "qrs_ms"): -0.42,
    ("hypertrophy", "strain"): 2.2,  # strain of the wall, without unit, is a cause in its turn
    ("LVEF_pct", "strain"): -0.065,
    ("strain", "qrs_axis_deg"): -8.0,
    ("age", "qrs_axis_deg"): -0.5,
    ("bmi", "qrs_axis_deg"): -1.2,
    ("turn_deg", "qrs_axis_deg"): 0.8,
    ("LVEF_pct", "q_back"): -0.008,  # directions of the Q, R and S waves have no unit
    ("LVEF_pct", "r_back"): -0.008,
    ("tilt", "r_back"): 1.0,
    ("ln RVEDV_ml", "s_right"): 0.25,
    ("RVEF_pct", "s_right"): -0.006,
    ("strain", "t_axis_deg"): 14.0,
    ("strain", "ln t_mv"): -0.22,
    ("sex", "ln t_mv"): 0.1398,  # a factor of 1.15
    ("age", "pr_ms"): 0.6,
    ("sex", "qt_ms"): -14.0,
    ("LVEF_pct", "qt_ms"): -0.9,
    ("depth_mm", "ln chest_leads"): -0.02,
}
AVERAGE = dict(age=64, sex=0, bmi=26.5, depth_mm=30, turn_deg=0, tilt=0)  # sex 0: female
AVERAGE.update(LVEDV_ml=145, LVEF_pct=60, LVM_g=85, RVEDV_ml=150, RVEF_pct=56)

# The simulated recorder
RECORDER_HZ = 500
RECORDER_MV = 0.005
# X (left), Y (foot), Z (back) of the heart vector -> I, II, V1..V6 (Dower 1980)
DOWER_X = [0.632, 0.235, -0.515, 0.044, 0.882, 1.213, 1.125, 0.831]
DOWER_Y = [-0.235, 1.066, 0.157, 0.164, 0.098, 0.127, 0.127, 0.076]
DOWER_Z = [0.059, -0.132, -0.917, -1.387, -1.277, -0.601, -0.086, 0.230]
DOWER = np.stack([DOWER_X, DOWER_Y, DOWER_Z], axis=1)  # (8, 3)

# The simulated scanner: its field of view, and pixels in mm from the middle of the image
STACK = (12, 72, 72)  # Z, Y, X
STACK_MM = (10.0, 3.0, 3.0)
CONTRACTION = {"ed": 0.0, "es": 1.0}  # of a phase: how far it is from end-diastole to end-systole
Y_MM = ((np.arange(STACK[1]) - (STACK[1] - 1) / 2) * STACK_MM[1])[:, None]  # (Y, 1)
X_MM = ((np.arange(STACK[2]) - (STACK[2] - 1) / 2) * STACK_MM[2])[None, :]  # (1, X)
GREY = {  # of tissues, as parts of that of the LV's blood
    "lv": 1.0,  # blood
    "rv": 0.92,  # blood
    "wall": 0.30,  # of the LV; what lies around it must differ, or its mass cannot be seen
    "fat": 0.42,  # around the heart
    "lung": 0.10,
    "chest wall": 0.60,
    "air": 0.02,
    "liver": 0.42,
    "stomach": 0.30,
    "aorta": 0.90,
}
ORGANS_MM = {  # discs: y, x from the middle of the image, radius
    "liver": (120, -70, 100),
    "stomach": (115, 75, 75),
    "aorta": (62, 52, 11),
}


# ---------------------------------------------------------------- hearts


def draw_heart(seed, subject):
    """State of one synthetic subject, a function of (seed, subject) alone: dict of scalars.

    Means and spreads after Petersen 2017 (J Cardiovasc Magn Reson 19:18), widened by a tenth of
    failing and a fifth of hypertrophic hearts. A pair (a, b)[sex] is of women and men.
    """
    rng = np.random.default_rng([seed, subject, 0])
    normal = rng.standard_normal
    uniform = rng.uniform

    # Body
    sex = int(uniform() < 0.48)
    age = float(np.clip(64 + 7.6 * normal(), 45, 82))
    height_cm = (163 + 6.3 * normal(), 176 + 6.7 * normal())[sex]  # both are drawn
    bmi = (26.0, 27.2)[sex] * np.exp(0.15 * normal())
    weight_kg = bmi * (height_cm / 100) ** 2
    surface_m2 = np.sqrt(height_cm * weight_kg / 3600)  # Mosteller 1987
    size = surface_m2 / (1.72, 1.98)[sex]

    # Disease: 0 in most hearts
    failing = (uniform() < 0.10) * uniform(0.3, 1.0)
    hypertrophy = (uniform() < 0.20) * uniform(0.1, 0.45)
    dilatation = 0.13 * normal()

    # Left ventricle
    lvef = np.clip((61.0, 58.5)[sex] + 4.6 * normal() - 24 * failing, 18, 78)
    lvedv = (123, 164)[sex] * size * np.exp(dilatation + 0.25 * failing - 0.004 * (age - 64))
    lvsv = lvedv * lvef / 100
    thickness = 0.4 * dilatation + hypertrophy + 0.12 * failing + 0.10 * normal()
    lvm = (67, 98)[sex] * size * np.exp(thickness)

    # Right ventricle: nearly the same stroke volume
    rvef = np.clip((58.0, 54.5)[sex] + 5.8 * normal() + 0.25 * (lvef - 60), 20, 78)
    rvedv = lvsv * np.exp(0.08 * normal()) / (rvef / 100)

    # Heart rate: what the body needs, over the stroke volume. It links the ECG to LVSV, too.
    output_ml = 2900 * surface_m2 * np.exp(0.14 * normal())  # a minute
    heart_rate = output_ml / lvsv

    # Place in the chest, which both ECG and CMR show
    depth_mm = 30 + 0.9 * (bmi - 26.5) + 7 * normal()  # from the chest wall to the heart
    turn_deg = 12 * normal()
    tilt = 0.10 * normal()  # slope of the long axis against the slices' normal

    # Outcomes: a noisy logistic of the state, prevalence about 6, 9 and 30 %
    logits = {
        "heart_failure": -3.6 + 0.14 * (59 - lvef) + 0.05 * (age - 64),
        "atrial_fibrillation": -2.7 + 0.07 * (age - 64) + 0.04 * (59 - lvef) + 2 * dilatation,
        "hypertension": -1.2 + 5 * hypertrophy + 0.05 * (age - 64) + 0.08 * (bmi - 26),
    }
    outcomes = {name: int(uniform() < 1 / (1 + np.exp(-logit))) for name, logit in logits.items()}

    body = dict(age=age, sex=sex, bmi=bmi, surface_m2=surface_m2)
    left = dict(LVEDV_ml=lvedv, LVESV_ml=lvedv - lvsv, LVSV_ml=lvsv, LVEF_pct=lvef, LVM_g=lvm)
    right = dict(RVEDV_ml=rvedv, RVESV_ml=rvedv * (1 - rvef / 100), RVEF_pct=rvef)
    place = dict(depth_mm=depth_mm, turn_deg=turn_deg, tilt=tilt)
    heart_rate_bpm = np.clip(heart_rate, 40, 115)
    return {**body, **left, **right, **place, **outcomes, "heart_rate_bpm": heart_rate_bpm}


# ---------------------------------------------------------------- ECG


def link_causes(heart):
    """Every cause that LINKS may name, as a deviation from AVERAGE: {name: value}."""
    causes = {}
    for name, average in AVERAGE.items():
        causes[name] = heart[name] - average
        if average:
            causes[f"ln {name}"] = np.log(heart[name] / average)
    usual_g = (42, 52)[heart["sex"]] * heart["surface_m2"]  # women, men: g/m2 of body surface
    causes["hypertrophy"] = heart["LVM_g"] / usual_g - 1
    causes["strain"] = linked("strain", causes)
    return causes


def linked(target, causes):
    """What the links to one property of the ECG add to it: the sum of strength x cause."""
    total = 0
    for (cause, name), strength in LINKS.items():
        if name == target:
            total += strength * causes[cause]
    return total


def wave_properties(heart, rng):
    """Properties of a subject's ECG: average + links + chance, drawn in the order of the lines."""
    normal = rng.standard_normal
    causes = link_causes(heart)
    wave = SimpleNamespace()
    voltage = np.exp(linked("ln voltage", causes) + 0.08 * normal())
    wave.qrs_mv = voltage * np.exp(linked("ln qrs_mv", causes) + 0.16 * normal())
    wave.qrs_ms = 87.5 + linked("qrs_ms", causes) + 6 * normal()
    wave.qrs_axis_deg = 45 + linked("qrs_axis_deg", causes) + 11 * normal()
    wave.r_back = 0.25 + linked("r_back", causes) + 0.12 * normal()
    wave.t_axis_deg = 40 + linked("t_axis_deg", causes) + 12 * normal()
    wave.t_mv = voltage * np.exp(linked("ln t_mv", causes) + 0.25 * normal())
    wave.q_back = -0.34 + linked("q_back", causes) + 0.10 * normal()
    wave.s_right = 0.20 + linked("s_right", causes) + 0.08 * normal()
    wave.pr_ms = 160 + linked("pr_ms", causes) + 18 * normal()
    wave.qt_ms = 412 + linked("qt_ms", causes) + 15 * normal()  # at 60 beats a minute
    wave.p_mv = voltage * 0.11 * np.exp(0.2 * normal())
    wave.ln_chest_leads = linked("ln chest_leads", causes)  # its chance is drawn after the beats
    return wave


def draw_beats(rr_s, rng):
    """Times of the R waves (s), from before the recording's start to after its end."""
    beats_s = []
    beat_s = -rng.uniform(0, rr_s)
    while beat_s < data.SECONDS + 0.5:
        beats_s.append(beat_s)
        breathing = 0.03 * np.sin(2 * np.pi * 0.25 * beat_s)
        beat_s += rr_s * (1 + breathing + 0.02 * rng.standard_normal())
    return beats_s


def simulate_ecg(heart, rng):
    """12-lead ECG (12, 5000) in mV at 500 Hz with 5 uV resolution, as a recorder would store it.

    Waves are Gaussians in time on a heart vector (McSharry 2003; Sameni 2007), which the Dower
    matrix projects to the leads.
    """
    wave = wave_properties(heart, rng)
    rr_s = 60 / heart["heart_rate_bpm"]
    qt_s = wave.qt_ms / 1000 * np.sqrt(rr_s)  # Bazett 1920
    pr_s = wave.pr_ms / 1000
    width = wave.qrs_ms / 90
    axis = np.deg2rad(wave.qrs_axis_deg)
    t_axis = np.deg2rad(wave.t_axis_deg)
    waves = [  # centre (s after R), width (s), size (mV), direction to the left, the foot, the back
        [0.02 - pr_s, 0.022, wave.p_mv, 0.6, 0.8, -0.1],  # P
        [-0.024 * width, 0.008 * width, wave.qrs_mv, -0.14, 0.04, wave.q_back],  # Q
        [0, 0.011 * width, 1.55 * wave.qrs_mv, np.cos(axis), np.sin(axis), wave.r_back],  # R
        [0.026 * width, 0.010 * width, wave.qrs_mv, -wave.s_right, 0.02, 0.55],  # S
        [qt_s - 0.150, 0.048, 0.20 * wave.t_mv, np.cos(t_axis), np.sin(t_axis), -0.55],  # T rises
        [qt_s - 0.095, 0.030, 0.30 * wave.t_mv, np.cos(t_axis), np.sin(t_axis), -0.45],  # T falls
    ]
    centre_s, width_s, size_mv, direction = np.split(np.array(waves), [1, 2, 3], axis=1)

    # The heart vector: every beat from 0.4 s before R to 0.7 s after it
    seconds = np.arange(data.SECONDS * RECORDER_HZ) / RECORDER_HZ
    vector_mv = np.zeros((3, len(seconds)))
    for beat_s in draw_beats(rr_s, rng):
        first, last = np.searchsorted(seconds, [beat_s - 0.4, beat_s + 0.7])
        after_r_s = seconds[first:last] - beat_s
        bells = np.exp(-0.5 * ((after_r_s - centre_s) / width_s) ** 2)  # (6, t)
        vector_mv[:, first:last] += direction.T @ (size_mv * bells)

    # Leads: those on the chest are so near the heart that they tell its depth
    leads = DOWER @ vector_mv  # (8, T): I, II, V1..V6
    chest_gain = wave.ln_chest_leads + 0.08 * rng.standard_normal()
    leads[2:] *= np.exp(chest_gain)

    # The recorder adds noise, baseline wander and mains hum, and rounds
    leads += 0.012 * rng.standard_normal(leads.shape)
    for peak_mv, hertz in ((0.10, rng.uniform(0.1, 0.4)), (0.012, 50)):
        angle = 2 * np.pi * hertz * seconds
        leads += peak_mv * rng.standard_normal((8, 2)) @ np.stack([np.sin(angle), np.cos(angle)])
    ecg_mv = np.concatenate([leads[:2], data.LIMB_LEADS @ leads[:2], leads[2:]])
    return np.round(ecg_mv / RECORDER_MV) * RECORDER_MV


# ---------------------------------------------------------------- CMR


def half_ellipsoid(volume_ml, base_mm, length_mm):
    """Cut a half ellipsoid, base at base_mm below the stack's top, into the stack's slices.

    Returns float32 (2, Z, 1, 1): mean areas in the slices (mm2), and what part of each it fills.
    Between the base (depth 0) and a depth d in 0..1 lie (3 d - d^3) / 2 of its volume.
    """
    faces_mm = np.arange(STACK[0] + 1) * STACK_MM[0]
    depth = np.clip((faces_mm - base_mm) / length_mm, 0, 1)
    thickness_mm = length_mm * np.diff(depth)
    slice_mm3 = 1000 * volume_ml * np.diff((3 * depth - depth**3) / 2)
    area_mm2 = slice_mm3 / np.maximum(thickness_mm, 1e-9)
    filled = thickness_mm / STACK_MM[0]
    both = np.stack([area_mm2, filled]).astype(np.float32)  # (2, Z)
    return both[:, :, None, None]


def place_heart(heart, rng):
    """Draw where the heart lies: LV length and base (mm), and two float32 maps (Z, Y, X).

    radius_mm is the distance from the LV's axis, septal the cosine of the angle to the septum.
    """
    normal = rng.standard_normal
    place = SimpleNamespace()
    length_mm = 94 * (heart["LVEDV_ml"] / 140) ** (1 / 3) * np.exp(0.05 * normal())
    place.length_mm = min(length_mm, 106)
    middle_mm = STACK[0] * STACK_MM[0] / 2 - 4 + np.clip(normal(), -2, 2)
    place.base_mm = middle_mm - place.length_mm / 2

    # The axis in each slice (y, x): shifted, tilted, and moved by breathing from slice to slice
    z_mm = (np.arange(STACK[0]) - (STACK[0] - 1) / 2) * STACK_MM[0]
    slope = np.array([heart["tilt"], 0.05 * normal()])
    axis_mm = [0, 16] + 4 * normal(2) + z_mm[:, None] * slope + normal((STACK[0], 2))  # (Z, 2)

    axis_y_mm, axis_x_mm = axis_mm.T[:, :, None, None]  # (Z, 1, 1) each
    dy_mm = (Y_MM - axis_y_mm).astype(np.float32)  # (Z, Y, 1)
    dx_mm = (X_MM - axis_x_mm).astype(np.float32)  # (Z, 1, X)
    place.radius_mm = np.sqrt(dy_mm**2 + dx_mm**2)
    septum = np.pi + np.deg2rad(heart["turn_deg"] + 5 * normal())  # on the left of the image
    towards_septum = dy_mm * np.float32(np.sin(septum)) + dx_mm * np.float32(np.cos(septum))
    place.septal = towards_septum / np.maximum(place.radius_mm, 1)
    return place


def tissue_fractions(heart, contraction, place):
    """How much of each voxel is which tissue: {tissue: float32 (Z, Y, X) in 0..1}.

    Volumes hold by construction: in every slice, LV, wall and RV have the areas of half ellipsoids.
    The wall keeps its volume while the cavity empties, so that it thickens.
    """
    cavity_ml = heart["LVEDV_ml"] - contraction * heart["LVSV_ml"]
    rv_ml = heart["RVEDV_ml"] - contraction * (heart["RVEDV_ml"] - heart["RVESV_ml"])
    wall_ml = heart["LVM_g"] / 1.05  # g/ml

    # The base descends; the apex stays
    descent_mm = contraction * 14 * heart["LVEF_pct"] / 60
    base_mm = place.base_mm + descent_mm
    length_mm = place.length_mm - descent_mm

    # Cavity and whole LV: discs; 6 mm of wall at the apex
    cavity_mm2, cavity_filled = half_ellipsoid(cavity_ml, base_mm, length_mm)
    lv_mm2, lv_filled = half_ellipsoid(cavity_ml + wall_ml, base_mm, length_mm + 6)
    cavity_radius = np.sqrt(cavity_mm2 / np.pi)
    lv_radius = np.sqrt(lv_mm2 / np.pi)

    # RV: a crescent, which at an angle a from the septum reaches d cos(a) beyond the LV's radius r.
    # Its area is 2 r d + pi d^2 / 4; here that is solved for d.
    rv_mm2, rv_filled = half_ellipsoid(rv_ml, base_mm, 0.9 * length_mm)
    rv_depth = (np.sqrt(4 * lv_radius**2 + np.pi * rv_mm2) - 2 * lv_radius) * 2 / np.pi
    free_wall = lv_radius + rv_depth * np.maximum(place.septal, 0)  # (Z, Y, X)

    def disc(edge_mm):  # how much of each pixel lies within edge_mm of the axis
        return np.clip((edge_mm - place.radius_mm) / STACK_MM[1] + 0.5, 0, 1)

    cavity = cavity_filled * disc(cavity_radius)
    return {
        "lv": cavity,
        "wall": lv_filled * disc(lv_radius) - cavity,
        "rv": rv_filled * (disc(free_wall) - disc(lv_radius)),
        "fat": lv_filled * (disc(free_wall + 7) - disc(free_wall)),
    }


def draw_body(heart, rng):
    """What lies around the heart, in all slices the same: grey levels, float32 (Y, X)."""
    y_mm = Y_MM + 3 * rng.standard_normal()
    x_mm = X_MM + 4 * rng.standard_normal()

    def disc(centre_y, centre_x, radius_mm):  # its edge is 8 mm wide
        distance_mm = np.hypot(y_mm - centre_y, x_mm - centre_x)
        return np.clip((radius_mm - distance_mm) / 8 + 0.5, 0, 1)

    body = np.full(STACK[1:], GREY["lung"])
    for organ, place_mm in ORGANS_MM.items():
        body += (GREY[organ] - body) * disc(*place_mm)
    chest_mm = 92 + heart["depth_mm"]
    skin_mm = chest_mm + 10 + 0.5 * heart["bmi"]
    body += (GREY["chest wall"] - body) * (1 - disc(35, 30, chest_mm))
    body += (GREY["air"] - body) * (1 - disc(35, 30, skin_mm))
    return body.astype(np.float32)


def smooth_field(rng):
    """Normal draws on a coarse grid, 30 x 24 x 24 mm, linear between them: float32 (Z, Y, X)."""
    field = rng.standard_normal((4, 9, 9), dtype=np.float32)
    for size, nodes in zip(STACK, field.shape, strict=True):
        places = np.linspace(0, nodes - 1, size)
        weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(nodes)))  # (size, nodes)
        # The first axis becomes the last: after all three they are in order again.
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 1))
    return field


def simulate_cmr(heart, rng):
    """The heart as scanned: data.Scan of a short-axis stack, base first, in whole grey levels."""
    place = place_heart(heart, rng)
    body = draw_body(heart, rng)
    texture = 1 + 0.35 * smooth_field(rng)
    shading = 1 + 0.20 * smooth_field(rng)  # coils see some places better
    blood_grey = float(260 * np.exp(0.25 * rng.standard_normal()))  # of the LV; scanners differ
    noise = np.float32(rng.uniform(0.02, 0.05))

    phases = {}
    for phase in data.PHASES:
        # Each voxel is a mixture of the heart's tissues and of what lies around
        tissues = tissue_fractions(heart, CONTRACTION[phase], place)
        outside = 1 - sum(tissues.values())
        picture = outside * body * texture
        for tissue, fraction in tissues.items():
            picture += fraction * GREY[tissue] * (0.9 + 0.1 * texture)
        # Rician noise: a scanner measures a complex number and shows its size
        real = picture * shading + noise * rng.standard_normal(STACK, dtype=np.float32)
        imaginary = noise * rng.standard_normal(STACK, dtype=np.float32)
        rician = np.sqrt(real**2 + imaginary**2)
        phases[phase] = np.round(blood_grey * rician)
        if phase == "ed":
            mask = tissues["lv"] + tissues["wall"] + tissues["rv"] > 0.5
    return data.Scan(phases, np.array(STACK_MM), mask, warnings=[])


# ---------------------------------------------------------------- cohort folder


def simulate(seed, subject):
    """One subject as examined: (row of texts, ECG (12, 5000) in mV at RECORDER_HZ, data.Scan)."""
    heart = draw_heart(seed, subject)
    scan = simulate_cmr(heart, np.random.default_rng([seed, subject, 1]))
    ecg_mv = simulate_ecg(heart, np.random.default_rng([seed, subject, 2]))
    row = {name: f"{heart[name]:.5g}" for name in COLUMNS}
    row["id"] = f"{subject:06d}"
    row["split"] = data.split_of(row["id"])
    return row, ecg_mv, scan


def simulate_subject(seed, subject):
    """One subject of a cohort, cleaned and cropped as files are: data.Subject."""
    row, ecg_mv, scan = simulate(seed, subject)
    ecg, ecg_warnings = data.clean_ecg(ecg_mv, RECORDER_HZ)
    images, cmr_warnings = data.crop_heart(scan, row["id"])
    return data.Subject(row, {"ecg": ecg, **images}, [*ecg_warnings, *cmr_warnings])


def make_cohort(folder, subjects, seed=0, workers=None):
    """Write a synthetic cohort folder; subject i depends on (seed, i) alone. workers: processes."""
    task = partial(simulate_subject, seed)
    made = data.run_parallel(task, range(subjects), workers, "synthesizing")
    source = {"kind": "synthetic", "subjects": subjects, "seed": seed}
    return data.write_cohort(folder, made, COLUMNS, source)


def default_cohort():
    """The cohort that train.py takes where no data are named: data.Cohort, made on first use."""
    folder = Path("cohorts/synthetic-3000-0")
    if not folder.exists():
        make_cohort(folder, subjects=3000, seed=0)
    return data.open_cohort(folder)


# ---------------------------------------------------------------- raw files

# At RECORDER_HZ, in steps of RECORDER_MV
CARDIOSOFT = """<?xml version="1.0" encoding="ISO-8859-1"?>
<CardiologyXML><StripData><SampleRate units="Hz">500</SampleRate>
<Resolution units="uVperLsb">5</Resolution>
{}
</StripData></CardiologyXML>
"""


def write_cardiosoft(path, ecg_uv):
    """The 10 s rhythm of a GE CardioSoft XML file."""
    lines = []
    for lead, samples in zip(data.LEADS, ecg_uv // 5, strict=True):
        text = ",".join(map(str, samples))
        lines.append(f'<WaveformData lead="{lead}">{text}</WaveformData>')
    path.write_text(CARDIOSOFT.format("\n".join(lines)))


def write_wfdb(path, ecg_uv, ending):
    """WFDB header and, beside it, samples as .dat or .mat (https://wfdb.io/spec/header-files.html)."""
    samples_path = path.with_suffix(f".{ending}")
    form = "16"
    if ending == "mat":
        form = "16+24"  # MATLAB 4 puts 24 bytes in front of the same samples
        scipy.io.savemat(samples_path, {"val": ecg_uv}, format="4")
    else:
        samples_path.write_bytes(ecg_uv.T.tobytes())
    lines = [f"{path.stem} {len(ecg_uv)} {RECORDER_HZ} {ecg_uv.shape[1]}"]
    for lead, samples in zip(data.LEADS, ecg_uv, strict=True):
        scale = "1000(0)/mV 16 0"  # steps per mV (step of 0 mV), bits, middle of the bits
        checksum = samples.sum(dtype=np.int16)  # in 16 bits, as the format asks
        lines.append(f"{samples_path.name} {form} {scale} {samples[0]} {checksum} 0 {lead}")
    path.write_text("\n".join(lines) + "\n")


def write_nifti(path, volume):
    """Write (Z, Y, X[, T]) as (x, y, z[, t]) with the oblique affine of a short-axis stack."""
    directions = data.SHORT_AXIS / np.linalg.norm(data.SHORT_AXIS, axis=1, keepdims=True)
    affine = np.eye(4)
    affine[:3, :3] = directions[::-1].T * STACK_MM[::-1]
    stored = np.swapaxes(volume, 0, 2).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(stored, affine), path)


def write_raw(folder, subjects, seed=0):
    """The hearts of make_cohort as raw files with manifest.csv, in every format that data.py reads.

    Of four subjects, one each has its ECG as .xml, .hea with .dat, .hea with .mat, and .npy; every
    third has a cine (of two frames) in place of ED and ES. Raises InputError where folder exists.
    """
    with data.new_folder(Path(folder)) as aside:
        rows = [write_raw_subject(aside, seed, subject) for subject in range(subjects)]
        files = [*data.FILE_COLUMNS, *data.READER_COLUMNS]
        data.write_csv(aside / "manifest.csv", ["id", *files, *COLUMNS], rows)


def write_raw_subject(folder, seed, subject):
    """Write the files of a subject: its row of the manifest."""
    row, ecg_mv, scan = simulate(seed, subject)
    name = row["id"]
    ecg_uv = np.round(ecg_mv * 1000).astype("<i2")
    kind = ("xml", "dat", "mat", "npy")[subject % 4]
    if kind == "xml":
        row["ecg"] = f"{name}.xml"
        write_cardiosoft(folder / row["ecg"], ecg_uv)
    elif kind == "npy":
        row["ecg"] = f"{name}.npy"
        row["ecg_hz"] = RECORDER_HZ
        np.save(folder / row["ecg"], ecg_mv)
    else:
        row["ecg"] = f"{name}.hea"
        write_wfdb(folder / row["ecg"], ecg_uv, kind)

    images = {"mask": scan.mask, **scan.phases}
    if subject % 3 == 2:
        row.update({f"{phase}_frame": k for k, phase in enumerate(scan.phases)})
        images = {"mask": scan.mask, "cine": np.stack(list(scan.phases.values()), axis=-1)}
    for column, volume in images.items():
        row[column] = f"{name}_{column}.nii.gz"
        write_nifti(folder / row[column], volume)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folder", help="folder to make; one that exists is not replaced")
    add("--subjects", type=int, default=3000, help="number of hearts (default 3000)")
    add("--seed", type=int, default=0, help="number that all draws follow from (default 0)")
    add("--workers", type=int, help="processes that make a cohort (default: one a core)")
    add("--raw", action="store_true", help="write raw files with manifest.csv, not a cohort")
    limits = {"subjects": (1, 10**6), "seed": (0, 2**63 - 1), "workers": (1, 1000)}
    args = data.parse_arguments(parser, limits)
    if args.raw:
        write_raw(args.folder, args.subjects, args.seed)
    else:
        make_cohort(args.folder, args.subjects, args.seed, args.workers)
    print(f"wrote {args.folder}, {args.subjects} subjects")


if __name__ == "__main__":
    data.run_command(main)
