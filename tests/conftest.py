"""Shared by all tests: the sources on the path, a tiny cohort, and two ways to run a script."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread, here and in subprocesses: tests are small, and runs are bit for bit the same.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = str(ROOT)

import torch  # noqa: E402  (after the number of threads is set)

import synthetic  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow before a release")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory):
    """64 synthetic subjects: 43 train, 6 val, 15 test."""
    folder = tmp_path_factory.mktemp("cohorts") / "tiny"
    synthetic.make_cohort(folder, subjects=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def real_data():
    """The folder of real ECG and CMR files that the environment variable REAL_DATA names."""
    if "REAL_DATA" not in os.environ:
        pytest.skip("set REAL_DATA to a folder with ecg/ and acdc/ to run this on real files")
    return Path(os.environ["REAL_DATA"])


@pytest.fixture(scope="session")
def run_script():
    """run_script("train.py", "--epochs", 3, cwd=folder) -> CompletedProcess, output as text.

    Runs in this process, which saves the seconds that importing torch takes.
    """

    def run(script, *arguments, cwd):
        argv = [str(ROOT / script), *map(str, arguments)]
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        former_argv = sys.argv
        sys.argv = argv
        code = 0
        with contextlib.chdir(cwd), contextlib.redirect_stdout(stdout):
            with contextlib.redirect_stderr(stderr):
                try:
                    runpy.run_path(argv[0], run_name="__main__")
                except SystemExit as leaving:
                    code = leaving.code or 0
        sys.argv = former_argv
        output = [stream.buffer.getvalue().decode() for stream in (stdout, stderr)]
        return subprocess.CompletedProcess(argv, code, *output)

    return run


@pytest.fixture(scope="session")
def start_script():
    """The same in a process of its own, as users start it; processes: more than 1 by torchrun."""

    def run(script, *arguments, cwd, processes=1):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(processes)]
        command += [str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run
