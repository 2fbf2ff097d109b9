"""Train the dual-phase model.

    python train.py --epochs 12                        # synthetic cohort, made on first use
    python train.py --data manifest.csv --epochs 100   # your files, prepared once, then reused
    python train.py --data cohort/ --epochs 100 --phases ed
    torchrun --nproc_per_node 8 train.py --data cohort/ --epochs 100 --batch-size 1024
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:1234 train.py

Weights start from the seed, and every draw after that is a function of (seed, epoch, subject): of
the same --batch-size, neither micro-batches, nor the number of processes, nor an interruption
changes the result by more than rounding.
"""

import argparse
import atexit
import io
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import loss
import models


def main():
    data.keep_memory()
    args = parse_arguments()
    world = start_processes(args.device)
    device, chief = world["device"], world["rank"] == 0
    find = partial(data.find_cohort, args.data)
    cohort = first_alone(find, world) or find()
    rows = {name: np.flatnonzero(cohort["split"] == name) for name in ("train", "val")}
    rows["train"] = rows["train"][: args.limit]
    args.batch_size = choose_batch_size(args.batch_size, len(rows["train"]), world["size"])
    steps = len(rows["train"]) // args.batch_size  # in an epoch
    partner = ecg_partners(cohort["split"], args.seed, args.shuffle_pairs)

    torch.manual_seed(args.seed)
    model = models.DualPhase(args.phases, amp=args.amp).to(device)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type != "mps")
    done = {"epoch": 0, "step": 0, "sums": {}, "log": [], "best": math.inf}
    first_alone(partial(os.makedirs, args.out, exist_ok=True), world)
    if args.resume:
        done = resume(args, cohort, model, optimizer) or done
    elif chief:  # a run to overwrite must not be taken for an interrupted part of this one
        for name in ("last.pt", "best.pt", "log.csv", "curves.png"):
            (Path(args.out) / name).unlink(missing_ok=True)
    if args.compile:
        model.compile()
    part = args.batch_size // world["size"]  # of each global batch, for this process
    own = slice(world["rank"] * part, (world["rank"] + 1) * part)
    pieces = math.ceil(part / (args.micro_batch or part))
    stop, names = stop_on_signal(), ("ecg", *args.phases)

    def load(subjects, epoch=None):  # on a thread, ahead of the step; validation as it is stored
        draws = None if epoch is None else (args.seed, epoch)
        return data.read_batch(cohort, subjects, device, partner[subjects], names, draws)

    if chief:
        counts = f"{len(rows['train'])} training, {len(rows['val'])} validation subjects"
        work = f"{steps} steps of {args.batch_size} pairs an epoch on {device.type}"
        print(f"{cohort['folder']}: {counts}; {work}")

    started, first = time.time(), done["epoch"]
    for epoch in range(done["epoch"], args.epochs):
        epoch_started = time.time()
        batches = data.epoch_batches(rows["train"], args.batch_size, args.seed, epoch)
        batches = [np.array_split(batch[own], pieces) for batch in batches[done["step"] :]]
        passes = min(pieces, 2)  # micro-batches are encoded twice: see loss.backward
        tasks = [piece for batch in batches for piece in batch * passes]
        stream = data.read_ahead(partial(load, epoch=epoch), tasks)
        model.train()
        for _ in batches:
            if stop_requested(stop, world):
                return leave(args, cohort, model, optimizer, done, chief)
            rate = learning_rate(args, epoch + done["step"] / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = loss.backward(model, stream, pieces, args.weights, args.temperature)
            why = "made the loss infinite or NaN; lower it, or raise --temperature"
            data.require(math.isfinite(terms["total"]), "--lr", why)
            optimizer.step()
            optimizer.zero_grad()
            done["step"] += 1
            for name, term in terms.items():
                done["sums"][name] = done["sums"].get(name, 0.0) + term.item()
            if chief and sys.stderr.isatty():
                text = f"epoch {epoch + 1} step {done['step']}/{steps} loss {terms['total']:.3f}  "
                print(text, end="\r", file=sys.stderr)

        row = {"epoch": epoch + 1, "lr": rate}
        row |= {name: total / steps for name, total in done["sums"].items()}
        done = done | {"epoch": epoch + 1, "step": 0, "sums": {}}
        if chief:
            row |= validate(model, load, rows["val"], args)
            row["seconds"] = time.time() - epoch_started
            score = row.get("val_total", row["total"])
            improved = score < done["best"]
            done |= {"log": [*done["log"], row], "best": min(done["best"], score)}
            files = ("best.pt", "last.pt") if improved else ("last.pt",)
            save(files, args, cohort, model, optimizer, done)
            left = (time.time() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1)
            print(describe(row, args, left), flush=True)
    if chief:
        draw_curves(args, cohort, done["log"])
        print(f"wrote {args.out}; next: python evaluate.py {args.out}")
    return 0


def parse_arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", metavar="PATH", help="manifest or cohort folder (default: 3000 synthetic hearts)")
    add("--epochs", type=int, default=12, metavar="N", help="passes over the data (12)")
    add("--out", metavar="DIR", help="run folder (runs/dual, runs/ed or runs/es by --phases)")
    add("--phases", nargs="+", choices=("ed", "es"), default=["ed", "es"], help="(ed es)")
    add("--batch-size", type=int, metavar="N", help="pairs a step, over all processes (64)")
    add("--micro-batch", type=int, default=0, metavar="N", help="encode N at a time; saves memory")
    add("--lr", type=float, default=2e-3, help="peak learning rate (2e-3)")
    add("--weight-decay", type=float, default=0.05, help="of weight matrices (0.05)")
    add("--warmup-epochs", type=float, default=1, metavar="N", help="linear warm-up (1)")
    add("--temperature", type=float, default=0.07, help="of the softmax over pairs (0.07)")
    names = ("ECG-ED", "ECG-ES", "ED-ES")
    add("--weights", type=float, nargs=3, default=[1, 1, 1], metavar=names, help="relative (1 1 1)")
    add("--seed", type=int, default=0, help="(0)")
    add("--resume", action="store_true", help="go on where the run in --out was interrupted")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--amp", action=flag, help="bfloat16 encoders (default: on CUDA only)")
    add("--compile", action=flag, default=False, help="torch.compile the model (no)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(auto)")
    add("--limit", type=int, metavar="N", help="train on the first N training subjects")
    add("--shuffle-pairs", action="store_true", help="negative control: ECGs of other subjects")
    args = parser.parse_args()

    args.phases = [name for name in ("ed", "es") if name in args.phases]
    args.out = args.out or f"runs/{'dual' if len(args.phases) == 2 else args.phases[0]}"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = next((name for name in available if available[name]), "cpu")
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    present = {"ecg", *args.phases}
    used = [w for w, pair in zip(args.weights, loss.PAIRS, strict=True) if {*pair} <= present]
    for fine, name, rule in (
        (args.epochs >= 1, "epochs", "must be at least 1"),
        (args.batch_size is None or args.batch_size >= 2, "batch-size", "must be at least 2"),
        (args.micro_batch >= 0, "micro-batch", "must be 0 (off) or more"),
        (0 < args.lr < math.inf, "lr", "must be positive"),
        (0 <= args.weight_decay < math.inf, "weight-decay", "must be 0 or more"),
        (0 <= args.warmup_epochs < math.inf, "warmup-epochs", "must be 0 or more"),
        (0 < args.temperature < math.inf, "temperature", "must be positive, 0.07 for instance"),
        (min(args.weights) >= 0, "weights", "must not be negative"),
        (0 < sum(used) < math.inf, "weights", "must be positive for a pair of --phases"),
        (0 <= args.seed < 2**63, "seed", "must be from 0 to 2^63 - 1"),
        (args.limit is None or args.limit >= 2, "limit", "must be at least 2"),
        (available.get(args.device, True), "device", f"{args.device} is not available here"),
    ):
        data.require(fine, f"--{name}", rule)
    out = Path(args.out)
    clear = all(path.is_dir() or not path.exists() for path in (out, *out.parents))
    data.require(clear, args.out, "passes through a file; name a folder")
    held = (out / "last.pt").exists() or (out / "best.pt").exists()
    free = args.resume or args.overwrite or not held
    data.require(free, args.out, "holds a run; add --resume or --overwrite, or give --out")
    return args


def start_processes(device):
    """Join the other processes if torchrun started this one: dict(rank, size, device)."""
    if "WORLD_SIZE" not in os.environ:
        return {"rank": 0, "size": 1, "device": torch.device(device)}
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first prepares raw files, for hours perhaps.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
    atexit.register(dist.destroy_process_group)  # its threads would abort an exit now and then
    return {"rank": dist.get_rank(), "size": dist.get_world_size(), "device": torch.device(device)}


def first_alone(task, world):
    """task() of the first process; the others wait, get None, and leave where it fails."""
    done, result = torch.zeros(1, device=world["device"]), None
    try:
        if world["rank"] == 0:
            result = task()
        done += 1
    finally:
        if world["size"] > 1:
            dist.broadcast(done, 0)
    if not done:
        sys.exit(2)  # the first process has said why
    return result


def choose_batch_size(wanted, subjects, processes):
    """--batch-size, or about 64: fewer with fewer subjects, a multiple of the processes."""
    size = wanted or min(max(64, 2 * processes), subjects) // processes * processes
    data.require(size >= 2, "--data", f"{subjects} training subjects are too few for contrast")
    why = f"{size} exceeds the {subjects} training subjects"
    data.require(size <= subjects, "--batch-size", why)
    why = f"{size} is no multiple of {processes} processes"
    data.require(size % processes == 0, "--batch-size", why)
    return size


def ecg_partners(split, seed, shuffle):
    """Whose ECG stands beside each heart: its own or, as a control, one drawn from its split.

    About one subject a split draws its own.
    """
    partner = np.arange(len(split))
    for name in data.SPLITS if shuffle else ():
        rows = np.flatnonzero(split == name)
        partner[rows] = np.random.default_rng([seed, len(rows)]).permutation(rows)
    return partner


def parameter_groups(model, weight_decay):
    """Decay matrices and kernels, but neither norms nor biases."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1]}
    vectors = {"params": [p for p in model.parameters() if p.ndim <= 1]}
    return [matrices | {"weight_decay": weight_decay}, vectors | {"weight_decay": 0.0}]


def learning_rate(args, epoch):
    """Linear warm-up, then a cosine to zero (Loshchilov 2017); epoch 2.5: halfway in the third."""
    if epoch < args.warmup_epochs:
        return args.lr * min(max(epoch, 0.02) / args.warmup_epochs, 1)
    part = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * part)) / 2


@torch.no_grad()
def validate(model, load, rows, args):
    """Loss terms and top-1 retrieval in equal parts of at most a batch, without augmentation.

    load: rows -> batch. Returns {val_total, val_ecg_ed, ... in nats, val_top1_ecg_ed, ...,
    val_top1_chance in 0..1}; nothing with fewer than 2 subjects.
    """
    if len(rows) < 2:
        return {}
    model.eval()
    pieces = np.array_split(rows, math.ceil(len(rows) / (args.micro_batch or args.batch_size)))
    stream = data.read_ahead(load, pieces)
    whole = models.encode_all(lambda batch: model.embed(model(batch)), stream, len(rows))
    sums = {}
    for part in np.array_split(np.arange(len(rows)), math.ceil(len(rows) / args.batch_size)):
        embeddings = {name: x[part] for name, x in whole.items()}
        terms = loss.dual_phase_loss(embeddings, args.weights, args.temperature)
        for phase in args.phases:
            ranks = loss.retrieval_ranks(embeddings["ecg"], embeddings[phase])
            terms[f"top1_ecg_{phase}"] = (ranks == 1).float().mean()
        terms["top1_chance"] = torch.tensor(1 / len(part))
        for name, term in terms.items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + term.item() * len(part) / len(rows)
    return sums


def describe(row, args, left):
    """One line an epoch: loss beside ln B, its terms, validation loss, top-1 beside chance."""
    terms = " ".join(f"{k} {row[k]:.2f}" for k in ("ecg_ed", "ecg_es", "ed_es") if k in row)
    text = f"epoch {row['epoch']}/{args.epochs} loss {row['total']:.3f} "
    text += f"(ln B {math.log(args.batch_size):.2f}) {terms}"
    if "val_total" in row:
        top1 = " ".join(f"{phase} {row[f'val_top1_ecg_{phase}']:.0%}" for phase in args.phases)
        chance = row["val_top1_chance"]
        text += f" | val {row['val_total']:.3f} (chance {-math.log(chance):.2f})"
        text += f" top-1 {top1} (chance {chance:.1%})"
    return f"{text} | lr {row['lr']:.1e} {row['seconds']:.1f} s, {left:.0f} s left"


def stop_on_signal():
    """SIGTERM and Ctrl-C ask for a stop after the current step; asked twice, it stops at once."""
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
    """Save an interrupted run and say how to go on. Returns the exit code."""
    if chief:
        save(["last.pt"], args, cohort, model, optimizer, done)
        draw_curves(args, cohort, done["log"])
        words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        start = "torchrun (as before)" if dist.is_initialized() else "python"
        text = f"interrupted after {done['epoch']} epochs and {done['step']} steps, all saved"
        print(f"{text}; go on with: {start} {shlex.join([*words, '--resume'])}", file=sys.stderr)
    return 130


def save(names, args, cohort, model, optimizer, done):
    """Write log.csv and, under each of the names, the checkpoint."""
    out = Path(args.out)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **done}
    state["args"] = vars(args) | {"data": str(cohort["folder"])}
    state["cohort"], state["grid"] = cohort["fingerprint"], list(cohort["grid"])
    if log := done["log"]:
        data.write(out / "log.csv", lambda file: data.write_csv(file.name, log[-1], log))
    packed = io.BytesIO()  # to a file, torch.save gives no OSError when the disk is full
    torch.save(state, packed)
    for name in names:
        data.write(out / name, lambda file: file.write(packed.getbuffer()))


def resume(args, cohort, model, optimizer):
    """Load last.pt into model and optimizer. Returns what was done; None if nothing was saved."""
    # What may differ between a run and its continuation: it changes nothing, or rounding alone.
    free = ("resume", "overwrite", "data", "out", "micro_batch", "device", "compile")
    path = Path(args.out) / "last.pt"
    if not path.exists():
        print(f"{path} was not written yet: starting from the beginning", file=sys.stderr)
        return None
    why = "is damaged or of another model ({error.__class__.__name__}); use --overwrite"
    with data.explain(path, why):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        former, differing = saved["args"]["data"], []
        if saved["cohort"] != cohort["fingerprint"]:
            differing += [f"--data was {former}, and {cohort['folder']} is another or made anew"]
        differing += [
            f"--{name.replace('_', '-')} was {saved['args'].get(name)} and is {value}"
            for name, value in vars(args).items()
            if name not in free and value != saved["args"].get(name)
        ]
        if not differing:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            done = {name: saved[name] for name in ("epoch", "step", "sums", "log", "best")}
    data.require(not differing, "--resume", "; ".join([*differing, "repeat the run's arguments"]))
    return done


def draw_curves(args, cohort, log):
    """curves.png: loss terms beside ln B, and top-1 retrieval beside chance, over epochs."""
    from matplotlib.figure import Figure  # slow to import, needed only here

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    title = f"{args.out} ({cohort['source']['kind']} cohort)"
    figure.suptitle(title, parse_math=False)  # two $ would enclose a formula
    left, right = figure.subplots(1, 2)
    names = {"total": "total", "ecg_ed": "ECG–ED", "ecg_es": "ECG–ES", "ed_es": "ED–ES"}
    names |= {"val_total": "total, validation"}
    shares = {"val_top1_ecg_ed": "ECG to ED", "val_top1_ecg_es": "ECG to ES"}
    shares |= {"val_top1_chance": "chance"}
    for axis, lines in ((left, names), (right, shares)):
        for name, text in lines.items():
            if points := [(row["epoch"], row[name]) for row in log if name in row]:
                style = "--" if name in ("val_total", "val_top1_chance") else "-"
                axis.plot(*zip(*points, strict=True), style, label=text)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.axhline(math.log(args.batch_size), color="gray", lw=1, label="ln B (chance)")
    if log and "val_top1_chance" in log[0]:
        chance = -math.log(log[0]["val_top1_chance"])
        left.axhline(chance, color="gray", lw=1, ls="--", label="chance, validation")
    left.set_ylabel("InfoNCE (nats)")
    right.set_ylabel("validation: own heart first in its batch")
    for axis in (left, right):
        if axis.lines:
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
    data.write(Path(args.out) / "curves.png", partial(figure.savefig, dpi=110, format="png"))


if __name__ == "__main__":
    data.exit_cleanly(main)
