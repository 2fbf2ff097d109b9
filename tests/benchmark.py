"""Speed and memory of training, as a Markdown table: python tests/benchmark.py [--device cuda]

Each case is train.py itself in processes of its own, on a cohort of 256 synthetic subjects that are
repeated. Run it on an idle machine; it takes some minutes and, for a while, 6 GB of disk.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import loss
import models
import synthetic
import train

EPOCHS = 3  # the first one warms up and is not counted
CORES = os.cpu_count()
# Title, subjects, processes, arguments of train.py.
CPU_CASES = [
    ("default", 3_000, 1, ""),
    ("34,000 subjects", 34_000, 1, ""),
    ("1 worker", 3_000, 1, "--workers 1"),
    ("amp", 3_000, 1, "--amp"),
    ("batch 1,024", 3_000, 1, "--batch-size 1024"),
    ("batch 1,024, micro-batch 64", 3_000, 1, "--batch-size 1024 --micro-batch 64"),
    ("2 processes", 3_000, 2, ""),
    ("2 processes, batch 1,024, micro 64", 3_000, 2, "--batch-size 1024 --micro-batch 64"),
]
CUDA_CASES = [
    ("default, no workers", 3_000, 1, "--workers 0"),
    ("4 workers", 3_000, 1, "--workers 4"),
    ("8 workers", 3_000, 1, "--workers 8"),
    ("8 workers, no amp", 3_000, 1, "--workers 8 --no-amp"),
    ("34,000 subjects", 34_000, 1, "--workers 8"),
    ("batch 1,024", 34_000, 1, "--workers 8 --batch-size 1024"),
    ("batch 1,024, no amp", 34_000, 1, "--workers 8 --batch-size 1024 --no-amp"),
    ("batch 1,024, no workers", 34_000, 1, "--workers 0 --batch-size 1024"),
    ("batch 8,192, micro 1,024", 34_000, 1, "--workers 8 --batch-size 8192 --micro-batch 1024"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--subjects", type=int, help=argparse.SUPPRESS)  # to try it quickly
    args = parser.parse_args()
    is_cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else f"{platform.machine()}, {CORES} cores"
    flops = flops_of_a_pair()
    rates = {dtype: multiply_rate(dtype, args.device) for dtype in ("float32", "bfloat16")}
    print(f"{name}, torch {torch.__version__}; {flops / 1e6:.0f} MFLOP a pair; matrix multiply")
    for dtype, rate in rates.items():
        print(f"{rate / 1e12:.2f} TFLOP/s in {'tf32' if is_cuda and dtype == 'float32' else dtype}")
    print("\n| case | pairs/s | share of matrix-multiply rate | waiting for data | peak memory |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for title, subjects, processes, words in CUDA_CASES if is_cuda else CPU_CASES:
            cohort = make_cohort(Path(folder), args.subjects or subjects)
            result = run_case(cohort, processes, ["--device", args.device, *words.split()])
            is_amp = "--amp" in words or is_cuda and "--no-amp" not in words
            rate = rates["bfloat16" if is_amp else "float32"]
            share = result["pairs_per_s"] * flops / rate
            columns = [title, f"{result['pairs_per_s']:.0f}", f"{share:.0%}"]
            columns += [f"{result['waiting']:.1%}", f"{result['peak_mb']:,.0f} MB"]
            print(f"| {' | '.join(columns)} |", flush=True)


def flops_of_a_pair():
    """Of one plain step, forward and backward; what a micro-batch encodes twice counts once."""
    model = models.DualPhase(train.DEFAULT_VIEWS, data.GRID[0])
    images = {phase: torch.rand(8, 1, *data.GRID) for phase in data.PHASES}
    batch = {"ecg": torch.randn(8, *data.ECG_SHAPE), **images}
    with FlopCounterMode(display=False) as counter:
        loss.dual_phase_loss(model.embed(model(batch)))["total"].backward()
    return counter.get_total_flops() / 8


def multiply_rate(dtype, device, repeats=15):
    """Floating point operations a second of a large matrix product, the median of several."""
    size = 8192 if device == "cuda" else 2048
    torch.set_float32_matmul_precision("high")  # tf32, which only CUDA has
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def make_cohort(folder, count):
    """A cohort of `count` subjects, the same 256 again and again; kept for the next case."""
    cohort = folder / f"cohort{count}"
    if not cohort.exists():
        examined = [synthetic.simulate_subject(0, subject) for subject in range(min(256, count))]

        def repeated():
            for k in range(count):
                subject = examined[k % len(examined)]
                row = {**subject.row, "id": str(k), "split": data.split_of(str(k))}
                yield data.Subject(row, subject.arrays)

        data.write_cohort(cohort, repeated(), synthetic.COLUMNS, {"kind": "synthetic"})
    return cohort


def run_case(cohort, processes, words):
    """train.py in new processes, each through `measure`: what that writes."""
    result = cohort.parent / "result.json"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, "--measure", str(result), "--data", str(cohort), "--overwrite"]
    command += ["--out", str(cohort.parent / "run"), "--epochs", str(EPOCHS), *words]
    threads = {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    finished = subprocess.run(command, env={**os.environ, **threads}, stderr=subprocess.PIPE)
    if finished.returncode:
        sys.exit(finished.stderr.decode())
    return json.loads(result.read_text())


def measure(path):
    """Run train.py in this process with a clock around its loader; the main process writes path."""
    passes = []  # over training and validation batches in turn
    make_loader = data.make_loader

    def timed(dataset, keys, workers=0):
        started = time.perf_counter()
        loader = iter(make_loader(dataset, keys, workers))
        waiting = 0.0
        for _ in keys:
            asked = time.perf_counter()
            stored = next(loader)
            waiting += time.perf_counter() - asked
            yield stored
        seconds = time.perf_counter() - started
        pairs = sum(len(indices) for _, indices in keys) * int(os.environ.get("WORLD_SIZE", 1))
        passes.append({"pairs": pairs, "seconds": seconds, "waiting": waiting})

    data.make_loader = timed
    code = train.main()
    if os.environ.get("RANK", "0") == "0":
        training = passes[2::2]  # from the second epoch on
        seconds = sum(row["seconds"] for row in training)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        result = {"pairs_per_s": sum(row["pairs"] for row in training) / seconds}
        result["waiting"] = sum(row["waiting"] for row in training) / seconds
        Path(path).write_text(json.dumps({**result, "peak_mb": peak}))
    return code


if __name__ == "__main__":
    if "--measure" in sys.argv:
        place = sys.argv.index("--measure")
        result_path = sys.argv[place + 1]
        del sys.argv[place : place + 2]
        data.run_command(lambda: measure(result_path))
    main()
