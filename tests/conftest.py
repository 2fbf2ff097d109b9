"""Shared by all tests: the sources on the path, one tiny cohort, and a way to run a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread, here and in subprocesses: tests are small, two of them then share two cores without
# waiting for each other, and runs are bit for bit the same.
os.environ["OMP_NUM_THREADS"] = "1"

import data  # noqa: E402  (needs the path above)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow before a release")


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory):
    """64 synthetic subjects (43 train, 6 val, 15 test), at half the resolution to be quick."""
    folder = tmp_path_factory.mktemp("cohorts") / "tiny"
    data.synthesize(
        folder, subjects=64, seed=0, workers=1, grid=(12, 32, 32), spacing_mm=(10, 6, 6)
    )
    return folder


@pytest.fixture(scope="session")
def run_script():
    """run_script("train.py", "--epochs", 3, cwd=folder) -> CompletedProcess, output as text.

    before: Python code that runs in the process first, e.g. to make it kill itself at a chosen
    moment. processes: more than 1 starts the script with torchrun.
    """

    def run(script, *arguments, cwd, before="", processes=1):
        command = [sys.executable, ROOT / script]
        if before:
            # The script sees the same argv, and modules patched by `before`.
            command = [sys.executable, "-c", before + RUN, ROOT / script]
        if processes > 1:
            torchrun = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                processes,
            ]
            command[1:1] = torchrun
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [str(part) for part in (*command, *arguments)]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
