"""Shared by all tests: the sources on the path, one tiny cohort, and a way to run a script."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread, here and in subprocesses: tests are small, two of them then share two cores without
# waiting for each other, and runs are bit for bit the same.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

import data  # noqa: E402  (needs the path above)

PRELOADED = ["train", "torch._dynamo", "matplotlib.backends.backend_agg"]
multiprocessing.set_forkserver_preload(PRELOADED)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow before a release")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory):
    """64 synthetic subjects (43 train, 6 val, 15 test), at half the resolution to be quick."""
    folder = tmp_path_factory.mktemp("cohorts") / "tiny"
    grid, spacing_mm = (12, 32, 32), (10, 6, 6)
    data.synthesize(folder, subjects=64, seed=0, workers=1, grid=grid, spacing_mm=spacing_mm)
    return folder


@pytest.fixture(scope="session")
def run_script():
    """run_script("train.py", "--epochs", 3, cwd=folder) -> CompletedProcess, output as text.

    processes: more than 1 starts the script with torchrun. before: Python code that runs in the
    process first; the script sees modules as it leaves them.
    """

    def run(script, *arguments, cwd, before="", processes=1):
        command = [sys.executable]
        if processes > 1:
            command += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                processes,
            ]
        if before:
            patched = Path(cwd) / "patched.py"
            patched.write_text(before + THEN_RUN)
            command.append(patched)
        command = [str(part) for part in (*command, ROOT / script, *arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def run_forked():
    """The same for one process, forked from one that has all imports behind it: saves 5 s a run."""
    forks = multiprocessing.get_context("forkserver")

    def run(script, *arguments, cwd, before=""):
        argv = [str(part) for part in (ROOT / script, *arguments)]
        process = forks.Process(target=become, args=(argv, cwd, before + THEN_RUN))
        process.start()
        process.join(300)
        output = [(Path(cwd) / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(argv, process.exitcode, *output)

    return run


def become(argv, cwd, code):
    """In the forked process: be the script, with output to files."""
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["", *argv]
    exec(code, {"__name__": "patched"})


THEN_RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
