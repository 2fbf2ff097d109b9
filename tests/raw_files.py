"""Small raw files of known content, as a hospital would export them, for the tests."""

import nibabel
import numpy as np

import data
import synthetic

CHEST = np.array([-0.5, 0.3, 0.8, 1.4, 1.3, 0.9])  # size of R in V1..V6


# ---------------------------------------------------------------- ECG


def twelve_leads(first, second, chest):
    """I, II (T,), V1..V6 (6, T) -> (12, T), limb leads after Einthoven and Goldberger."""
    third = second - first
    avr = -(first + second) / 2
    avl = first - second / 2
    avf = second - first / 2
    return np.vstack([first, second, third, avr, avl, avf, chest])


def rhythm(seconds=10, rate=500, bpm=60):
    """A regular 12-lead rhythm (12, T) in mV: R of 1 mV in II, 0.6 mV in I, and T waves."""
    time = np.arange(round(seconds * rate)) / rate
    r = np.zeros(len(time))
    t = np.zeros(len(time))
    for beat in np.arange(0.4, seconds, 60 / bpm):
        r += np.exp(-0.5 * ((time - beat) / 0.012) ** 2)
        t += np.exp(-0.5 * ((time - beat - 0.28) / 0.05) ** 2)
    return twelve_leads(0.6 * r + 0.12 * t, r + 0.3 * t, CHEST[:, None] * r + 0.2 * t)


def waveforms(ecg_mv, resolution_uv, leads):
    """WaveformData elements of CardioSoft, lines wrapped with tabs."""
    elements = []
    counts = np.round(ecg_mv * 1000 / resolution_uv).astype(int)
    for lead, samples in zip(leads, counts, strict=True):
        lines = [",".join(map(str, samples[k : k + 24])) for k in range(0, len(samples), 24)]
        text = ",\n\t\t\t".join(lines)
        elements.append(f'\t\t<WaveformData lead="{lead}">\n\t\t\t{text}</WaveformData>')
    return "\n".join(elements)


def xml_text(ecg_mv, rate=500, resolution=5, leads=data.LEADS):
    """CardioSoft XML: the rhythm, and before it median beats of nine times its voltage."""
    head = f'<SampleRate units="Hz">{rate}</SampleRate>'
    head += f'<Resolution units="uVperLsb">{resolution}</Resolution>'
    median = waveforms(9 * ecg_mv[:, :300], resolution, leads)
    strip = waveforms(ecg_mv, resolution, leads)
    return (
        '<?xml version="1.0" encoding="ISO-8859-1" ?>\n<CardiologyXML>\n'
        f"<RestingECGMeasurements><MedianSamples>{head}\n{median}</MedianSamples>"
        "</RestingECGMeasurements>\n"
        f"\t<StripData>\n\t\t<NumberOfLeads>12</NumberOfLeads>{head}\n{strip}\n\t</StripData>\n"
        "</CardiologyXML>\n"
    )


def write_xml(path, ecg_mv, **options):
    path.write_text(xml_text(ecg_mv, **options))


def write_wfdb(
    header, ecg_mv, end="dat", gain=1000, baseline=0, unit="mV", leads=data.LEADS, first=None
):
    """WFDB format 16 at 500 Hz beside its header; "mat" puts 24 bytes in front, as the Challenge.

    first: another first line of the header.
    """
    step_mv = {"mv": 1, "uv": 1e-3}[unit.lower()] / gain
    counts = np.round(ecg_mv / step_mv + baseline).astype("<i2")
    offset = {"dat": 0, "mat": 24}[end]
    signals = header.with_suffix(f".{end}")
    signals.write_bytes(bytes(offset) + counts.T.tobytes())
    form = f"16+{offset}" if offset else "16"
    zero = f"({baseline})" if baseline else ""
    sums = counts.sum(axis=1, dtype=np.int64) % 2**16  # the standard's checksum
    lines = [first or f"{header.stem} {len(leads)} 500 {counts.shape[1]}"]
    for first_count, checksum, lead in zip(counts[:, 0], sums, leads, strict=True):
        fields = f"{form} {gain}{zero}/{unit} 16 0 {first_count} {checksum} 0 {lead}"
        lines.append(f"{signals.name} {fields}")
    header.write_text("\n".join([*lines, "# Age: 60"]))
    return header


def write_shuffled(header, ecg_mv):
    """WFDB with the leads in another order, in capitals, and a thirteenth signal."""
    order = np.random.default_rng(1).permutation(13)
    names = [lead.upper() for lead in data.LEADS] + ["resp"]
    signals = np.vstack([ecg_mv, np.zeros(ecg_mv.shape[1])])
    return write_wfdb(header, signals[order], leads=[names[k] for k in order])


# ---------------------------------------------------------------- CMR


def heart_volumes(shape=(10, 44, 48), seed=0):
    """ED and ES int16 (Z, Y, X) of 10 x 3 x 3 mm: blood (250) in a wall (30), less at ES.

    The body around (60 to 80) is drawn anew for each seed, so that no two hearts are one array.
    """
    body = 60 + 20 * np.random.default_rng(seed).random(shape)
    y_mm = 3.0 * (np.arange(shape[1]) - shape[1] // 2)
    x_mm = 3.0 * (np.arange(shape[2]) - shape[2] // 2)
    radius_mm = np.hypot(y_mm[:, None], x_mm)
    phases = []
    for cavity_mm, wall_mm in ((24, 9), (15, 13)):
        volume = np.where(radius_mm < cavity_mm + wall_mm, 30, body)
        phases.append(np.where(radius_mm < cavity_mm, 250, volume).astype(np.int16))
    return phases


def oblique(spacing_mm=(10, 3, 3), tilt_degrees=0):
    """Affine of an (x, y, z) file whose axes run as data.SHORT_AXIS says, spacing (z, y, x).

    tilt_degrees: how far the slices are turned away from the heart, around the rows' direction.
    """
    z, y, x = data.SHORT_AXIS / np.linalg.norm(data.SHORT_AXIS, axis=1, keepdims=True)
    cos = np.cos(np.deg2rad(tilt_degrees))
    sin = np.sin(np.deg2rad(tilt_degrees))
    directions = np.column_stack([x, cos * y + sin * z, cos * z - sin * y])
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing_mm)[::-1]
    affine[:3, 3] = 3, -20, 50
    return affine


def beating_heart(contractions):
    """A synthetic heart seen at each contraction from 0 (ED) to 1 (ES): cine (Z, Y, X, T)."""
    heart = synthetic.draw_heart(0, 3)
    frames = []
    for contraction in contractions:
        state = {**heart, "LVEF_pct": heart["LVEF_pct"] * contraction}
        for side in ("LV", "RV"):
            stroke_ml = heart[f"{side}EDV_ml"] - heart[f"{side}ESV_ml"]
            state[f"{side}ESV_ml"] = heart[f"{side}EDV_ml"] - contraction * stroke_ml
        frames.append(synthetic.simulate_cmr(state, np.random.default_rng(0)).phases["es"])
    return np.stack(frames, axis=-1)


def scan_of(ed, es, spacing_mm=(10, 3, 3), mask=None):
    """data.Scan of two volumes (Z, Y, X), as data.read_scan would give it."""
    phases = {"ed": ed.astype(np.float32), "es": es.astype(np.float32)}
    return data.Scan(phases, np.array(spacing_mm, float), mask)


def write_nifti(path, volume, affine=None, pixdim=None, turn=None, version=1, endian="<"):
    """(Z, Y, X[, T]) stored as (x, y, z[, t]); the affine of a short axis unless another is given.

    pixdim (x, y, z): spacing that the header names, whatever the affine says. turn: nibabel's
    orientation array; the file is stored in that order of axes, with an affine that says so.
    """
    image_class = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    header = image_class.header_class(endianness=endian)
    affine = oblique() if affine is None else affine
    image = image_class(np.swapaxes(volume, 0, 2), affine, header)
    image.set_data_dtype(volume.dtype)
    if turn is not None:
        image = image.as_reoriented(np.array(turn))
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
        image.update_header = lambda: None  # else nibabel would repair the spacing
    nibabel.save(image, path)
    return path


def write_as_acdc(path, volume, spacing_mm=(10, 3, 3)):
    """As ACDC and many converters write: the affine of no direction, the spacing right."""
    return write_nifti(path, volume, np.eye(4), pixdim=spacing_mm[::-1])


def ellipsoid(shape, spacing_mm, radii_mm, parts=4):
    """Share of each voxel (Z, Y, X) within an ellipsoid in the middle, by parts^3 points each."""
    axes = []
    for size, mm, radius in zip(shape, spacing_mm, radii_mm, strict=True):
        axes.append(((np.arange(size * parts) + 0.5) / parts - size / 2) * mm / radius)
    z, y, x = np.ix_(*axes)
    inside = z**2 + y**2 + x**2 < 1
    blocks = inside.reshape(shape[0], parts, shape[1], parts, shape[2], parts)
    return blocks.mean(axis=(1, 3, 5)).astype(np.float32)


# ---------------------------------------------------------------- subjects


def write_subject(folder, name="a", number=0):
    """A good subject: dict(id, ecg, ed, es) of file names. Other numbers give other arrays."""
    ed, es = heart_volumes(seed=number)
    write_wfdb(folder / f"{name}.hea", rhythm(bpm=60 + number))
    write_nifti(folder / f"{name}_ed.nii.gz", ed)
    write_nifti(folder / f"{name}_es.nii.gz", es)
    return {"id": name, "ecg": f"{name}.hea", "ed": f"{name}_ed.nii.gz", "es": f"{name}_es.nii.gz"}


def write_manifest(folder, rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    data.write_csv(folder / "manifest.csv", columns, rows)
    return folder / "manifest.csv"


def random_subjects(count, seed=0):
    """Subjects of noise, ready for data.write_cohort, with one column x of 0, 1, 2, …"""
    rng = np.random.default_rng(seed)
    subjects = []
    for k in range(count):
        row = {"id": f"s{k}", "split": data.SPLITS[k % 3], "x": str(k)}
        arrays = {"ecg": rng.integers(-999, 999, data.ECG_SHAPE, np.int16)}
        for phase in data.PHASES:
            arrays[phase] = rng.integers(0, 255, data.GRID, np.uint8, endpoint=True)
        subjects.append(data.Subject(row, arrays))
    return subjects


def files_below(folder):
    """What a refusal must not change: every file below a folder, its size and time of change."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    return files


# ---------------------------------------------------------------- bad files


def replaced(old, new, last=False):
    """A change of bytes: the first (or last) `old` becomes `new`."""

    def change(content):
        head, found, tail = (content.rpartition if last else content.partition)(old.encode())
        assert found, f"no {old} to replace"
        return head + new.encode() + tail

    return change


def dimensions(*sizes):
    """A change of bytes: these dimensions in a NIfTI header."""
    content = np.array(sizes, "<i2").tobytes()
    return lambda whole: whole[:40] + content + whole[40 + len(content) :]


def flipped(content, bit):
    """Bytes with one bit flipped."""
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def mutated(content, rng):
    """Bytes flipped, cut, inserted, doubled or overwritten in up to three places, many in front."""
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, 1 + len(content) if rng.random() < 0.5 else 400))
        end = place + int(2 ** rng.uniform(0, 7))
        piece = content[place:end]
        number = [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"-1e9", b"9999"][rng.integers(0, 4)]
        changes = [b"", rng.bytes(9) + piece, 2 * piece, number + piece[4:]]
        if piece:
            changes.append(flipped(piece, int(rng.integers(0, 8))))
        tail = content[end:] if rng.random() < 0.9 else b""
        content = content[:place] + changes[rng.integers(0, len(changes))] + tail
    return content


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def write_bad(path, kind, content):
    """Write a bad file at `path` (which gets a suffix): the cells of a row that names it.

    kind: "xml", "hea", "dat", "npy" or a column of images, "ed", "es", "mask", "cine". content: all
    bytes of the file; or a change of a good file's bytes; or an array (xml: mV) to write instead;
    or options of write_nifti. kind "row": content is the cells.
    """
    if kind == "row":
        return content
    ed, es = heart_volumes()
    good = {"xml": rhythm(), "npy": rhythm(), "ed": ed, "es": es, "mask": (ed > 200).astype("i2")}
    array = content if isinstance(content, np.ndarray) else good.get(kind.split()[0])
    suffix = f".{kind}"
    column = "ecg"
    if kind == "xml":
        path.with_suffix(suffix).write_text(xml_text(array))
    elif kind == "npy":
        np.save(path.with_suffix(suffix), array)
    elif kind in ("hea", "dat"):
        write_wfdb(path.with_suffix(".hea"), rhythm())
    else:
        column, _, packed = kind.partition(" ")
        suffix = ".nii.gz" if packed else ".nii"
        options = content if isinstance(content, dict) else {}
        write_nifti(path.with_suffix(suffix), **{"volume": array, **options})
    path = path.with_suffix(suffix)
    if isinstance(content, str | bytes):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif callable(content):
        path.write_bytes(content(path.read_bytes()))
    return {column: path.with_suffix(".hea").name if kind == "dat" else path.name}
