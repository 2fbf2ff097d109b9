"""Train the dual-phase model.

    python train.py --epochs 12                          # synthetic cohort, made on first use; writes runs/dual
    python train.py --data manifest.csv --epochs 100     # your files: prepared once into a cohort folder, then reused
    python train.py --data cohort/ --epochs 100 --phases ed
    torchrun --nproc_per_node 8 train.py --data cohort/ --epochs 100 --batch-size 1024
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...

Every random draw is a function of (seed, epoch, subject), so neither micro-batches, nor the number
of processes, nor an interruption changes the result by more than rounding.
"""
import argparse
import csv
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import loss
import models

# What may differ between a run and its continuation, because it changes nothing but rounding.
FREE = ("resume", "overwrite", "data", "out", "micro_batch", "device", "compile")


def main():
    args = parse_arguments()
    world = start_processes(args.device)
    device, chief = world["device"], world["rank"] == 0
    torch.manual_seed(args.seed)
    cohort = data.find_cohort(args.data) if chief else None
    if world["size"] > 1:
        dist.barrier()  # the first process has prepared the cohort for all
        cohort = cohort or data.find_cohort(args.data)
    rows = {name: np.flatnonzero(cohort["split"] == name) for name in ("train", "val")}
    rows["train"] = rows["train"][: args.limit]
    args.batch_size = choose_batch_size(args.batch_size, len(rows["train"]), world["size"])
    partner = ecg_partners(cohort["split"], args.seed, args.shuffle_pairs)
    steps = len(rows["train"]) // args.batch_size  # an epoch

    model = models.DualPhase(args.phases, amp=args.amp).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    done = {"epoch": 0, "step": 0, "sums": {}, "log": [], "best": math.inf}
    if args.resume:
        done = resume(args, cohort, model, optimizer, device) or done
    if args.compile:
        model.compile()
    encode = DistributedDataParallel(model, broadcast_buffers=False) if world["size"] > 1 else model
    stop = stop_on_signal()
    own = slice(*(args.batch_size * r // world["size"] for r in (world["rank"], world["rank"] + 1)))
    if chief:
        print(f"{cohort['folder']}: {len(rows['train'])} training, {len(rows['val'])} validation subjects; "
              f"{steps} steps of {args.batch_size} pairs an epoch on {device.type}")

    started, first = time.time(), done["epoch"]
    for epoch in range(done["epoch"], args.epochs):
        epoch_started = time.time()
        batches = data.epoch_batches(rows["train"], args.batch_size, args.seed, epoch)

        def load(subjects, epoch=epoch):  # on a thread, ahead of the step
            subjects = subjects[own]  # this process's part of the global batch
            batch = data.read_batch(cohort, subjects, device, partner[subjects])
            return data.augment(batch, subjects, args.seed, epoch)

        model.train()
        for batch in data.read_ahead(load, batches[done["step"] :]):
            rate = learning_rate(args, (epoch + done["step"] / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = loss.backward(model, encode, batch, args.micro_batch, args.weights, args.temperature)
            optimizer.step()
            optimizer.zero_grad()
            done["step"] += 1
            for name, term in terms.items():
                done["sums"][name] = done["sums"].get(name, 0.0) + term.item()
            if chief and sys.stderr.isatty():
                print(f"epoch {epoch + 1} step {done['step']}/{steps} loss {terms['total']:.3f}  ",
                      end="\r", file=sys.stderr)
            if done["step"] < steps and stop_requested(stop, world):
                return leave(args, cohort, model, optimizer, done, chief)

        row = {"epoch": epoch + 1, "lr": rate, **{name: sum_ / steps for name, sum_ in done["sums"].items()}}
        if chief:
            row |= validate(model, cohort, rows["val"], partner, args, device)
            row["seconds"] = time.time() - epoch_started
            score = row.get("val_total", row["total"])
            improved, best = score < done["best"], min(score, done["best"])
            done = {"epoch": epoch + 1, "step": 0, "sums": {}, "log": [*done["log"], row], "best": best}
            if improved:
                save("best.pt", args, cohort, model, optimizer, done)
            save("last.pt", args, cohort, model, optimizer, done)
            left = (time.time() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1)
            print(describe(row, args, left), flush=True)
        done = done | {"epoch": epoch + 1, "step": 0, "sums": {}}
        if epoch + 1 < args.epochs and stop_requested(stop, world):
            return leave(args, cohort, model, optimizer, done, chief)
    if chief:
        draw_curves(args, done["log"])
        print(f"wrote {args.out}; next: python evaluate.py {args.out}")
    return 0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="PATH", help="manifest.csv or cohort folder (default: 3,000 synthetic hearts)")
    add("--epochs", type=int, default=12, metavar="N", help="passes over the training split (default 12)")
    add("--out", metavar="DIR", help="run folder (default runs/dual, runs/ed or runs/es by --phases)")
    add("--phases", nargs="+", choices=("ed", "es"), default=["ed", "es"], help="default: ed es")
    add("--batch-size", type=int, metavar="N",
        help="pairs a step over all processes (default 64, or all training subjects if fewer)")
    add("--micro-batch", type=int, default=0, metavar="N",
        help="encode N pairs at a time: bounds memory, changes nothing else (default 0: off)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    add("--weight-decay", type=float, default=0.05, help="of weight matrices (default 0.05)")
    add("--warmup-epochs", type=float, default=1, metavar="N", help="linear warm-up (default 1)")
    add("--temperature", type=float, default=0.07, help="of the softmax over pairs (default 0.07)")
    add("--weights", type=float, nargs=3, default=[1, 1, 1], metavar=("a", "b", "c"),
        help="of the ECG-ED, ECG-ES and ED-ES terms, normalised to sum 1 (default 1 1 1)")
    add("--seed", type=int, default=0, help="default 0")
    add("--resume", action="store_true", help="continue the run in --out where it was interrupted")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 encoders (default: on CUDA only)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile (default: no)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")
    add("--limit", type=int, metavar="N", help="train on the first N training subjects only")
    add("--shuffle-pairs", action="store_true", help="negative control: ECGs permuted against hearts")
    args = parser.parse_args()
    args.phases = [name for name in ("ed", "es") if name in args.phases]
    args.out = args.out or f"runs/{'dual' if len(args.phases) == 2 else args.phases[0]}"
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        args.device = "mps" if torch.backends.mps.is_available() else args.device
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    present = [w for w, pair in zip(args.weights, loss.PAIRS, strict=True)
               if {*pair} <= {"ecg", *args.phases}]
    for rule, name, text in (
            (args.epochs >= 1, "epochs", "must be at least 1"),
            (args.batch_size is None or args.batch_size >= 2, "batch-size", "must be at least 2, as pairs compete"),
            (args.micro_batch >= 0, "micro-batch", "must be 0 or more"),
            (0 < args.lr < math.inf, "lr", "must be positive"),
            (0 <= args.weight_decay < math.inf, "weight-decay", "must be 0 or more"),
            (0 <= args.warmup_epochs < math.inf, "warmup-epochs", "must be 0 or more"),
            (0 < args.temperature < math.inf, "temperature", "must be positive, e.g. 0.07"),
            (min(args.weights) >= 0 and 0 < sum(present) < math.inf, "weights",
             "must not be negative, and a term of --phases needs a positive one"),
            (args.seed >= 0, "seed", "must be 0 or more"),
            (args.limit is None or args.limit >= 2, "limit", "must be at least 2"),
            (args.device != "cuda" or torch.cuda.is_available(), "device", "cuda is not available here"),
            (args.device != "mps" or torch.backends.mps.is_available(), "device", "mps is not available here"),
            (args.resume or args.overwrite or not (Path(args.out) / "last.pt").exists(), "out",
             f"{args.out} holds a run already; add --resume or --overwrite, or choose another --out")):
        if not rule:
            raise data.InputError(f"--{name}", text)
    return args


def start_processes(device):
    """Join the other processes when torchrun started this one: dict(rank, size, device)."""
    if "WORLD_SIZE" not in os.environ:
        return {"rank": 0, "size": 1, "device": torch.device(device)}
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Other processes wait in the first barrier while the first one prepares raw files, hours perhaps.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
    return {"rank": dist.get_rank(), "size": dist.get_world_size(), "device": torch.device(device)}


def choose_batch_size(wanted, subjects, processes):
    """The global batch size: --batch-size, or 64 where there are as many training subjects."""
    size = wanted or min(64, subjects) // processes * processes
    if subjects < 2 or size < 2:
        raise data.InputError("--data", f"has {subjects} training subjects; contrast needs at least 2")
    if size > subjects:
        raise data.InputError("--batch-size", f"{size} is larger than the training split ({subjects})")
    if size % processes:
        raise data.InputError("--batch-size", f"{size} is no multiple of the {processes} processes")
    return size


def ecg_partners(split, seed, shuffle):
    """Whose ECG stands beside each row's heart: its own or, as a control, another one of its split."""
    partner = np.arange(len(split))
    if shuffle:
        for name in ("train", "val", "test"):
            rows = np.flatnonzero(split == name)
            partner[rows] = np.random.default_rng([seed, len(rows)]).permutation(rows)
    return partner


def parameter_groups(model, weight_decay):
    """Decay matrices and kernels, but neither norms nor biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def learning_rate(args, epoch):
    """Linear warm-up, then a cosine to zero; epoch is fractional."""
    if epoch < args.warmup_epochs:
        return args.lr * max(epoch, 0.02) / args.warmup_epochs
    part = (epoch - args.warmup_epochs) / max(args.epochs - args.warmup_epochs, 1e-9)
    return args.lr * (1 + math.cos(math.pi * min(part, 1))) / 2


@torch.no_grad()
def validate(model, cohort, rows, partner, args, device):
    """Loss terms and top-1 retrieval within equal parts no larger than a batch, without augmentation."""
    if len(rows) < 2:
        return {}
    model.eval()
    sums, parts = {}, np.array_split(rows, math.ceil(len(rows) / args.batch_size))
    for part in parts:
        embeddings = model.embed(model(data.read_batch(cohort, part, device, partner[part])))
        terms = loss.dual_phase_loss(embeddings, args.weights, args.temperature)
        for phase in args.phases:
            ranks = loss.retrieval_ranks(embeddings["ecg"], embeddings[phase])
            terms[f"top1_ecg_{phase}"] = (ranks == 1).float().mean()
        terms["top1_chance"] = torch.tensor(1 / len(part))
        for name, term in terms.items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + term.item() * len(part) / len(rows)
    return sums


def describe(row, args, left):
    """One line an epoch: training loss beside ln B, its terms, validation loss and top-1 beside chance."""
    terms = " ".join(f"{name} {row[name]:.2f}" for name in ("ecg_ed", "ecg_es", "ed_es") if name in row)
    text = f"epoch {row['epoch']}/{args.epochs} loss {row['total']:.3f} (ln B {math.log(args.batch_size):.2f}) {terms}"
    if "val_total" in row:
        top1 = " ".join(f"{phase} {row[f'val_top1_ecg_{phase}']:.0%}" for phase in args.phases)
        text += f" | val {row['val_total']:.3f} top-1 {top1} (chance {row['val_top1_chance']:.1%})"
    return f"{text} | lr {row['lr']:.1e} {row['seconds']:.1f} s, {left:.0f} s left"


def stop_on_signal():
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second one stops at once."""
    stop = {"asked": False}

    def ask(number, frame):
        if stop["asked"]:
            raise KeyboardInterrupt
        stop["asked"] = True

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def stop_requested(stop, world):
    """Whether any process was asked to stop: all must leave after the same step."""
    if world["size"] == 1:
        return stop["asked"]
    asked = torch.tensor([float(stop["asked"])], device=world["device"])
    dist.all_reduce(asked)
    return asked.item() > 0


def leave(args, cohort, model, optimizer, done, chief):
    if chief:
        save("last.pt", args, cohort, model, optimizer, done)
        draw_curves(args, done["log"])
        again = shlex.join(sys.argv + ([] if args.resume else ["--resume"]))
        print(f"interrupted after {done['epoch']} epochs and {done['step']} steps; saved; continue with: "
              f"python {again.replace(' --overwrite', '')}", file=sys.stderr)
    return 130


def save(name, args, cohort, model, optimizer, done):
    """Write a checkpoint and log.csv aside, then rename: no name ever holds half a file."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **done,
                "args": vars(args) | {"data": str(cohort["folder"])}, "cohort": cohort["fingerprint"]},
               out / f"{name}.partial")
    os.replace(out / f"{name}.partial", out / name)
    if done["log"]:
        with open(out / "log.csv.partial", "w", newline="") as file:
            writer = csv.DictWriter(file, done["log"][-1].keys(), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(done["log"])
        os.replace(out / "log.csv.partial", out / "log.csv")


def resume(args, cohort, model, optimizer, device):
    """Load last.pt into model and optimizer. Returns what was done, or None when nothing was saved yet."""
    path = Path(args.out) / "last.pt"
    if not path.exists():
        print(f"{path} was not written yet: starting from the beginning", file=sys.stderr)
        return None
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        differing = [f"--{name.replace('_', '-')} was {value}, is {getattr(args, name)}"
                     for name, value in saved["args"].items()
                     if name not in FREE and value != getattr(args, name)]
        if saved["cohort"] != cohort["fingerprint"]:
            differing.append(f"the cohort was {saved['args']['data']}, is {cohort['folder']} or has changed")
        if differing:
            raise data.InputError("--resume", "; ".join(differing) + "; give the run's own arguments")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return {name: saved[name] for name in ("epoch", "step", "sums", "log", "best")}
    except data.InputError:
        raise
    except Exception as error:
        raise data.InputError(path, f"is damaged ({type(error).__name__}); start again with --overwrite") from None


def draw_curves(args, log):
    """curves.png: loss terms beside ln B, and top-1 retrieval beside chance, over epochs."""
    from matplotlib.figure import Figure  # slow to import, needed only here

    if not log:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in log]
    for axis, names in ((left, ("total", "ecg_ed", "ecg_es", "ed_es", "val_total")),
                        (right, ("val_top1_ecg_ed", "val_top1_ecg_es", "val_top1_chance"))):
        for name in names:
            if name in log[-1]:
                style = "--" if name.startswith("val_total") or name.endswith("chance") else "-"
                axis.plot(epochs, [row.get(name) for row in log], style, label=name.replace("_", " "))
        axis.set_xlabel("epoch")
    left.axhline(math.log(args.batch_size), color="gray", lw=1)
    left.text(epochs[0], math.log(args.batch_size), "ln B (chance)", va="bottom", color="gray")
    left.set_ylabel("InfoNCE (nats)")
    right.set_ylabel("validation top-1 within a batch")
    for axis in (left, right):
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(Path(args.out) / "curves.png.partial", dpi=110, format="png")
    os.replace(Path(args.out) / "curves.png.partial", Path(args.out) / "curves.png")


if __name__ == "__main__":
    data.exit_cleanly(main)
