"""Speed and memory of train.py, as a Markdown table: python tests/benchmark.py [--device cuda]

On 256 synthetic subjects, repeated; takes some minutes and 6 GB of disk. Let nothing else run.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import loss
import models
import synthetic
import train

# Title, subjects, processes, arguments of train.py.
CPU_CASES = [
    ("default", 3_000, 1, ""),
    ("34,000 subjects", 34_000, 1, ""),
    ("amp", 3_000, 1, "--amp"),
    ("batch 1,024", 3_000, 1, "--batch-size 1024"),
    ("batch 1,024, micro-batch 64", 3_000, 1, "--batch-size 1024 --micro-batch 64"),
    ("2 processes", 3_000, 2, ""),
    ("2 processes, batch 1,024, micro 64", 3_000, 2, "--batch-size 1024 --micro-batch 64"),
]
CUDA_CASES = [
    ("no workers", 3_000, 1, "--workers 0"),
    ("default: 4 workers", 3_000, 1, ""),
    ("8 workers", 3_000, 1, "--workers 8"),
    ("34,000 subjects", 34_000, 1, "--workers 8"),
    ("batch 1,024", 34_000, 1, "--workers 8 --batch-size 1024"),
    ("batch 1,024, no amp", 34_000, 1, "--workers 8 --batch-size 1024 --no-amp"),
    ("batch 8,192, micro 1,024", 34_000, 1, "--workers 8 --batch-size 8192 --micro-batch 1024"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--subjects", type=int, help=argparse.SUPPRESS)  # for a quick trial
    args = parser.parse_args()
    is_cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else f"{os.cpu_count()} CPU cores"
    flops = flops_of_a_pair()
    print(f"{name}, torch {torch.__version__}; {flops / 1e6:.0f} MFLOP a pair")
    rates = {dtype: multiply_rate(dtype, args.device) for dtype in ("float32", "bfloat16")}
    print("matrix multiply, GFLOP/s:", {dtype: round(rate / 1e9) for dtype, rate in rates.items()})
    print("\n| case | pairs/s | share of matrix-multiply rate | waiting for data | peak memory |")
    print("|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for title, subjects, processes, words in CUDA_CASES if is_cuda else CPU_CASES:
            words += f" --device {args.device}"
            words += " --batch-size 32" if args.subjects else ""
            cohort = make_cohort(Path(folder), args.subjects or subjects)
            speed, wait, peak = run_case(cohort, processes, words)
            is_amp = "--amp" in words or is_cuda and "--no-amp" not in words
            share = speed * flops / rates["bfloat16" if is_amp else "float32"]
            line = f"| {title} | {speed:.0f} | {share:.0%} | {wait:.1%} | {peak:.0f} MB |"
            print(line, flush=True)


def flops_of_a_pair():
    """Of one plain step, forward and backward; what a micro-batch encodes twice counts once."""
    model = models.DualPhase(train.DEFAULT_VIEWS, data.GRID[0])
    batch = {phase: torch.rand(8, 1, *data.GRID) for phase in data.PHASES}
    batch["ecg"] = torch.randn(8, *data.ECG_SHAPE)
    with FlopCounterMode(display=False) as counter:
        loss.dual_phase_loss(model.embed(model(batch)))["total"].backward()
    return counter.get_total_flops() / 8


def multiply_rate(dtype, device, repeats=15):
    """Floating point operations a second of a large matrix product, the median of several."""
    size = 8192 if device == "cuda" else 2048
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions do by default
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    times = [time.perf_counter()]
    for _ in range(repeats):
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter())
    return 2 * size**3 / np.median(np.diff(times))


def make_cohort(folder, count):
    """A cohort of `count` subjects, the same 256 again and again; kept for the next case."""
    cohort = folder / f"cohort{count}"

    def repeated():
        examined = [synthetic.simulate_subject(0, k) for k in range(256)]
        for k in range(count):
            row = {**examined[k % 256].cells, "id": str(k), "split": data.split_of(str(k))}
            yield data.Subject(row, examined[k % 256].arrays)

    if not cohort.exists():
        data.write_cohort(cohort, repeated(), synthetic.COLUMNS, {"kind": "synthetic"})
    return cohort


def run_case(cohort, processes, words):
    """train.py in processes of its own, through `measure`: the three numbers that it prints."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__]
    command += f"--data {cohort.name} --out run --overwrite --epochs 3 {words}".split()
    where = {"cwd": cohort.parent, "env": {**os.environ, "MEASURE": "1"}}
    finished = subprocess.run(command, **where, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def measure():
    """Run train.py with a clock around its loader; prints [pairs/s, share of waiting, MB]."""
    passes = []  # over training and validation batches in turn
    make_loader = data.make_loader

    def timed(dataset, keys, workers=0):
        started = time.perf_counter()
        loader = iter(make_loader(dataset, keys, workers))
        waiting = time.perf_counter() - started
        for _ in keys:
            asked = time.perf_counter()
            stored = next(loader)
            waiting += time.perf_counter() - asked
            yield stored
        pairs = sum(len(indices) for _, indices in keys) * int(os.environ.get("WORLD_SIZE", 1))
        passes.append([pairs, time.perf_counter() - started, waiting])

    data.make_loader = timed
    train.main()
    if os.environ.get("RANK", "0") == "0":
        pairs, seconds, waiting = np.sum(passes[2::2], axis=0)  # training, but for a first epoch
        peak_mb = torch.cuda.max_memory_allocated() / 2**20  # 0 on the CPU
        peak_mb = peak_mb or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps([pairs / seconds, waiting / seconds, peak_mb]))


if __name__ == "__main__":
    data.run_command(measure if "MEASURE" in os.environ else main)
