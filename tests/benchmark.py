"""Speed and memory of training and of prepare, as a Markdown table: python tests/benchmark.py

Every case is train.py itself in child processes of its own, on a cohort made of 256 prepared
subjects, repeated. Run it on an idle machine; it takes some minutes and, for a while, 6 GB of disk.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import loss
import models
import train

PREPARED, EPOCHS = 256, 3  # the first epoch only warms up
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
HALF, MICRO = max(1, CORES // 2), ["--micro-batch", "64"]
# What it is, subjects, batch, more arguments, processes, threads a process.
CASES = [
    ("default", 3_000, 64, [], 1, CORES),
    ("34,000 subjects", 34_000, 64, ["--epochs", "2"], 1, CORES),
    ("amp", 3_000, 64, ["--amp"], 1, CORES),
    ("batch 1,024", 3_000, 1024, [], 1, CORES),
    ("batch 1,024, micro 64", 3_000, 1024, MICRO, 1, CORES),
    ("batch 1,024, micro 64, amp", 3_000, 1024, [*MICRO, "--amp"], 1, CORES),
    ("2 processes", 3_000, 64, [], 2, HALF),
    ("2 processes, batch 1,024, micro 64", 3_000, 1024, MICRO, 2, HALF),
]


def matrix_multiply_rate(dtype, size=2048, repeats=15):
    """Floating point operations a second of torch.mm, the median of several."""
    a, b = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def random_batch(size):
    """Noise in the shapes of data.read_batch, as speed does not depend on what is in a batch."""
    images = {phase: torch.rand(size, 1, *data.GRID) for phase in ("ed", "es")}
    return {"ecg": torch.randn(size, 12, 2500), **images}


def flops_of_a_pair(size=64):
    """Of one plain training step, forward and backward; encoding twice is no extra credit."""
    model = models.DualPhase()
    batch = random_batch(size)
    with FlopCounterMode(display=False) as counter:
        loss.backward(model, iter([batch]), 1, (1, 1, 1), 0.07)
    return counter.get_total_flops() / size


def step_seconds(size=64, repeats=30):
    """One training step on a batch that lies in memory, nothing else running: median seconds."""
    model = models.DualPhase()
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), fused=True)
    batch = random_batch(size)
    seconds = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        loss.backward(model, iter([batch]), 1, (1, 1, 1), 0.07)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[5:])


def make_cohorts(folder):
    """Prepare raw files, timed, then repeat the subjects. Returns prepare's subjects a second."""
    data.write_demo(folder / "demo", PREPARED)
    started = time.perf_counter()
    data.prepare(folder / "demo" / "manifest.csv", folder / "small")
    rate = PREPARED / (time.perf_counter() - started)
    arrays = {name: np.load(folder / "small" / f"{name}.npy") for name in ("ecg", "ed", "es")}
    table = data.read_table(folder / "small" / "subjects.csv", ["id"])

    def repeated(subjects):
        splits = np.repeat(data.SPLITS, [subjects * share // 100 for share in (70, 15, 15)])
        for k, split in enumerate(splits):
            one = {name: array[k % len(array)] for name, array in arrays.items()}
            row = table[k % len(table)] | {"id": str(k), "split": split}
            yield one | {"warnings": [], "row": row}

    for subjects in {case[1] for case in CASES}:
        cohort, source = folder / str(subjects), {"kind": "test"}
        columns, made = data.SYNTHETIC_COLUMNS, repeated(subjects)
        data.write_cohort(cohort, made, columns, data.GRID, data.SPACING_MM, source)
    return rate


def measured(results):
    """Run train.py as argv says, with clocks around the data; write down the result."""
    epochs, read_ahead = [], data.read_ahead

    def timed(load, tasks):
        batches, waited, asked = read_ahead(load, tasks), [], []
        if isinstance(load, partial):  # a pass of training, not of validation
            epochs.append({"asked": asked, "waited": waited})
        while True:
            asked.append(time.perf_counter())
            batch = next(batches, None)
            waited.append(time.perf_counter() - asked[-1])
            if batch is None:
                return
            yield batch

    data.read_ahead = timed
    code = train.main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = peak / (2**20 if platform.system() == "Darwin" else 2**10)
    shares = []
    for epoch in epochs[1:]:  # the first one warms up; of the last piece no end is known
        pieces = len(epoch["asked"])
        seconds = (epoch["asked"][-1] - epoch["asked"][0]) * pieces / (pieces - 1)
        shares.append({"seconds": seconds, "waited": sum(epoch["waited"])})
    result = {name: statistics.median(share[name] for share in shares) for name in shares[0]}
    Path(f"{results}.{os.environ.get('RANK', 0)}").write_text(json.dumps(result | {"mb": peak_mb}))
    return code


def run(folder, subjects, batch, more, processes, threads):
    """One case in child processes: what `measured` wrote, of each process."""
    results = folder / "result"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), __file__, str(results)]
    command += ["--data", folder / str(subjects), "--out", folder / "run", "--overwrite"]
    command += ["--epochs", str(EPOCHS), "--batch-size", str(batch), *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(Path(f"{results}.{rank}").read_text()) for rank in range(processes)]


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = make_cohorts(folder)
        torch.set_num_threads(CORES)
        data.keep_memory()  # as train.py does
        flops = flops_of_a_pair()
        rates = {kind: matrix_multiply_rate(kind) for kind in (torch.float32, torch.bfloat16)}
        print(f"\n{platform.machine()}, {CORES} cores, torch {torch.__version__}; "
              f"matrix multiply {rates[torch.float32] / 1e9:.0f} GFLOP/s in float32, "
              f"{rates[torch.bfloat16] / 1e9:.0f} in bfloat16; {flops / 1e6:.0f} MFLOP a pair; "
              f"prepare: {prepared:.0f} subjects/s")  # fmt: skip
        alone = 64 / step_seconds()
        share = alone * flops / rates[torch.float32]
        print(f"The step alone, on one batch of 64 in memory: {alone:.0f} pairs/s, {share:.0%}\n")
        print("| case | processes × threads | pairs/s | share of matrix-multiply rate | "
              "waiting for data | peak memory a process |")  # fmt: skip
        print("|---" * 6 + "|")
        for title, subjects, batch, more, processes, threads in CASES:
            ranks = run(folder, subjects, batch, more, processes, threads)
            seconds = max(rank["seconds"] for rank in ranks)
            pairs = subjects * 70 // 100 // batch * batch / seconds
            share = pairs * flops / rates[torch.bfloat16 if "--amp" in more else torch.float32]
            waiting = max(rank["waited"] for rank in ranks) / seconds
            peak = max(rank["mb"] for rank in ranks)
            print(f"| {title} | {processes} × {threads} | {pairs:.0f} | {share:.0%} | "
                  f"{waiting:.1%} | {peak:,.0f} MB |", flush=True)  # fmt: skip


if __name__ == "__main__" and len(sys.argv) > 1:
    results = sys.argv.pop(1)
    data.exit_cleanly(lambda: measured(results))
elif __name__ == "__main__":
    main()
