"""Small raw files of known content, as a hospital would export them, for the tests."""

import nibabel
import numpy as np

import data

CHEST = np.array([-0.5, 0.3, 0.8, 1.4, 1.3, 0.9])


def twelve_leads(first, second, chest):
    """I, II (T,), V1..V6 (6, T) -> (12, T), limb leads after Einthoven and Goldberger."""
    limb = [first, second, second - first, -(first + second) / 2, first - second / 2]
    return np.vstack([*limb, second - first / 2, chest])


def rhythm(seconds=10, rate=500, bpm=60):
    """A regular 12-lead rhythm (12, T) in mV: R of 1 mV in II, 0.6 mV in I, and T waves."""
    time = np.arange(round(seconds * rate)) / rate
    r, t = (
        sum(
            np.exp(-0.5 * ((time - beat - at) / width) ** 2)
            for beat in np.arange(0.4, seconds, 60 / bpm)
        )
        for at, width in ((0.0, 0.012), (0.28, 0.05))
    )
    return twelve_leads(0.6 * r + 0.12 * t, r + 0.3 * t, CHEST[:, None] * r + 0.2 * t)


def xml_text(ecg_mv, rate=500, resolution=5, leads=data.LEADS, strip="StripData"):
    """CardioSoft XML, lines wrapped with tabs, median beats of another voltage beside."""

    def blocks(values):
        for lead, samples in zip(
            leads, np.round(values * 1000 / resolution).astype(int), strict=True
        ):
            lines = [",".join(map(str, samples[k : k + 24])) for k in range(0, len(samples), 24)]
            yield (
                f'\t\t<WaveformData lead="{lead}">\n\t\t\t'
                + ",\n\t\t\t".join(lines)
                + "</WaveformData>"
            )

    head = f'<SampleRate units="Hz">{rate}</SampleRate>'
    head += f'<Resolution units="uVperLsb">{resolution}</Resolution>'
    median, full = "\n".join(blocks(9 * ecg_mv[:, :300])), "\n".join(blocks(ecg_mv))
    return (
        '<?xml version="1.0" encoding="ISO-8859-1" ?>\n<CardiologyXML>\n'
        f"<RestingECGMeasurements><MedianSamples>{head}\n{median}</MedianSamples></RestingECGMeasurements>\n"
        f"\t<{strip}>\n\t\t<NumberOfLeads>12</NumberOfLeads>{head}\n{full}\n\t</{strip}>\n</CardiologyXML>\n"
    )


def write_wfdb(
    header, ecg_mv, rate=500, end="dat", gain=1000, baseline=0, unit="mV", leads=data.LEADS
):
    """WFDB format 16 beside its header; "mat" puts 24 bytes in front, as the Challenge does."""
    scale = {"mv": 1, "uv": 1e-3}[unit.lower()] / gain  # mV per count
    counts = np.round(ecg_mv / scale + baseline).astype("<i2")
    offset = {"dat": 0, "mat": 24}[end]
    source = header.with_suffix(f".{end}")
    source.write_bytes(bytes(offset) + counts.T.tobytes())
    form = f"16+{offset}" if offset else "16"
    zero = f"({baseline})" if baseline else ""
    lines = [f"{source.name} {form} {gain}{zero}/{unit} 16 0 0 0 0 {lead}" for lead in leads]
    header.write_text(
        "\n".join([f"{header.stem} {len(leads)} {rate} {counts.shape[1]}", *lines, "# Age: 60"])
    )
    return header


def heart_volumes(shape=(10, 48, 48)):
    """ED and ES (Z, Y, X): a bright disc in a darker wall on a textured body, smaller at ES."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: shape[1], : shape[2]] * 3.0 - 3.0 * np.array(
        [[[shape[1] // 2]], [[shape[2] // 2]]]
    )
    radius = np.hypot(y, x)[None]
    body = 60 + 20 * rng.random(shape)
    return [
        np.where(radius < inner, 250, np.where(radius < inner + wall, 30, body)).astype(np.int16)
        for inner, wall in ((24, 9), (15, 13))
    ]


def write_nifti(path, volume, spacing_mm=(10.0, 3.0, 3.0), affine=None, pixdim=None):
    """(Z, Y, X[, T]) stored as (x, y, z[, t]); by default the affine of ACDC, unit columns."""
    order = (2, 1, 0, 3)[: volume.ndim]
    image = nibabel.Nifti1Image(volume.transpose(order), np.eye(4) if affine is None else affine)
    if affine is None:
        image.header["pixdim"][1:4] = spacing_mm[::-1]
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
    image.update_header = lambda: None  # keep pixdim apart from the affine
    nibabel.save(image, path)
    return path


def write_subject(folder, name="a"):
    """One good subject: dict(id, ecg, ed, es) of file names in folder."""
    write_wfdb(folder / f"{name}.hea", rhythm())
    for phase, volume in zip(("ed", "es"), heart_volumes(), strict=True):
        write_nifti(folder / f"{name}_{phase}.nii.gz", volume)
    return {"id": name, "ecg": f"{name}.hea", "ed": f"{name}_ed.nii.gz", "es": f"{name}_es.nii.gz"}


def write_manifest(folder, rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    data.write_csv(folder / "manifest.csv", columns, rows)
    return folder / "manifest.csv"
