"""Train the dual-phase model.

    python train.py --epochs 12                        # synthetic cohort, made on first use
    python train.py --data manifest.csv --epochs 100   # your files, prepared once, then reused
    python train.py --data cohort/ --epochs 100
    python train.py --epochs 12 --views ed --slices 1 --out runs/ed2d      # an ablation
    torchrun --nproc_per_node 8 train.py --data cohort/ --epochs 100 --batch-size 1024

Weights start from the seed, and every draw after that is a function of (seed, epoch, subject): of
the same --batch-size, neither micro-batches, nor the number of processes, nor an interruption
changes the result by more than rounding.
"""

import argparse
import io
import math
import os
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
import synthetic

DEFAULT_VIEWS = ["ed", "es"]  # the paper's two latents

# Smallest and largest value of each numeric option.
LIMITS = {
    "epochs": (1, 10**6),
    "slices": (1, data.GRID[0]),
    "batch_size": (2, 10**6),
    "micro_batch": (1, 10**6),
    "lr": (1e-9, 1e9),
    "weight_decay": (0, 1e9),
    "warmup_epochs": (0, 10**6),
    "temperature": (1e-9, 1e9),
    "seed": (0, 2**63 - 1),
    "workers": (0, 64),
    "limit": (2, 10**9),
}
# May differ between a run and its continuation: they change nothing, or rounding alone.
FREE_ON_RESUME = ("resume", "overwrite", "data", "out", "micro_batch", "workers", "device")


def main():
    args, defaults = parse_arguments()
    check_run_folder(args)
    world_size, rank = start_processes(args.device)
    is_main_process = rank == 0
    device = torch.device(args.device)

    # Data: every process takes its share of each global batch.
    cohort = find_cohort(args.data, is_main_process)
    train_indices = cohort.indices("train")[: args.limit]
    val_indices = cohort.indices("val")
    args.batch_size = choose_batch_size(args.batch_size, len(train_indices), world_size)
    steps_per_epoch = len(train_indices) // args.batch_size
    share = args.batch_size // world_size
    local_rows = slice(rank * share, (rank + 1) * share)
    partners = ecg_partners(cohort, args.seed) if args.shuffle_pairs else None

    # Model, optimizer, and what an earlier start of this run has reached.
    torch.manual_seed(args.seed)
    model = models.build(args).to(device)
    dataset = data.CohortDataset(cohort, model.inputs, partners)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    log = []  # one row an epoch
    if args.resume:
        log = resume(args, defaults, cohort, model, optimizer)
    lr_factor = partial(warmup_then_cosine, args=args, steps_per_epoch=steps_per_epoch)
    last_step = len(log) * steps_per_epoch - 1  # -1: none was taken; LambdaLR makes one at once
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor, last_step)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    if is_main_process:
        counts = f"{len(train_indices)} training, {len(val_indices)} validation subjects"
        steps = f"{steps_per_epoch} steps of {args.batch_size} pairs an epoch on {device.type}"
        print(f"{cohort.folder}: {counts}; {steps}")
    try:
        for epoch in range(len(log), args.epochs):
            started = time.time()
            batches = data.epoch_batches(train_indices, args.batch_size, args.seed, epoch)
            keys = [(epoch, indices[local_rows]) for indices in batches]
            lr = scheduler.get_last_lr()[0]
            step_losses = []
            model.train()
            for stored in data.make_loader(dataset, keys, args.workers):
                batch = data.to_batch(stored, device, seed=args.seed)  # {"ecg", "ed", "es"}
                if args.micro_batch or world_size > 1:
                    micro_batch = args.micro_batch or share
                    losses = loss.global_batch_backward(
                        model, batch, micro_batch, autocast, args.weights, args.temperature
                    )
                else:
                    with autocast:
                        features = model(batch)  # {name: (B, 128)}
                    embeddings = model.embed(features)  # {name: (B, 128)}, unit vectors
                    losses = loss.dual_phase_loss(embeddings, args.weights, args.temperature)
                    losses["total"].backward()
                step_losses.append({name: value.item() for name, value in losses.items()})
                require_finite(step_losses[-1]["total"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

            if is_main_process:
                row = {"epoch": epoch + 1, "lr": lr, **mean_of(step_losses)}
                row.update(validate(model, dataset, val_indices, args))
                row["seconds"] = time.time() - started
                log.append(row)
                save_checkpoint(args, cohort, model, optimizer, log)
                print(describe(row, args), flush=True)
    except KeyboardInterrupt:
        hint = "go on with --resume" if epoch else "start again"
        print(f"interrupted; {epoch} epochs are saved in {args.out}; {hint}", file=sys.stderr)
        return 130
    if is_main_process:
        finish_run(args, cohort, model, log)
    return 0


# ---------------------------------------------------------------- arguments and processes


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", metavar="PATH", help="manifest or cohort folder (default: synthetic hearts)")
    add("--epochs", type=int, default=12, metavar="N", help="passes over the data (12)")
    add("--out", metavar="DIR", help="run folder (runs/dual, or runs/ and the views)")
    views = {"nargs": "+", "choices": models.VIEWS, "default": DEFAULT_VIEWS, "metavar": "V"}
    add("--views", **views, help=f"CMR latents among {' '.join(models.VIEWS)} (ed es)")
    add("--slices", type=int, default=data.GRID[0], metavar="N", help="middle slices seen (all 12)")
    weights_help = "weights of loss terms, e.g. ed_es=0 ecg_ed=2 (all 1)"
    add("--weights", nargs="+", default=[], metavar="P=W", help=weights_help)
    add("--batch-size", type=int, metavar="N", help="pairs a step, over all processes (64)")
    add("--micro-batch", type=int, metavar="N", help="encode N pairs at a time; saves memory (off)")
    add("--lr", type=float, default=2e-3, metavar="X", help="peak learning rate (2e-3)")
    add("--weight-decay", type=float, default=0.05, metavar="X", help="of weight matrices (0.05)")
    add("--warmup-epochs", type=float, default=1, metavar="N", help="linear warm-up (1)")
    add("--temperature", type=float, default=0.07, metavar="X", help="τ of the loss (0.07)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and draws (0)")
    add("--workers", type=int, metavar="N", help="processes that read data (0; 4 with CUDA)")
    add("--resume", action="store_true", help="go on after the last saved epoch of --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    amp_help = "bfloat16 in the encoders (default: with CUDA only)"
    add("--amp", action=argparse.BooleanOptionalAction, help=amp_help)
    devices = ("auto", "cpu", "cuda", "mps")
    add("--device", choices=devices, default="auto", help="where to run (auto)")
    add("--limit", type=int, metavar="N", help="train on the first N training subjects (all)")
    add("--shuffle-pairs", action="store_true", help="negative control: ECGs of other subjects")
    args = complete_arguments(data.parse_arguments(parser, LIMITS))
    defaults = complete_arguments(parser.parse_args([]))
    return args, defaults


def complete_arguments(args):
    """Fill in what depends on the machine or on other arguments."""
    both = args.resume and args.overwrite
    data.require(not both, "--resume", "contradicts --overwrite; give one of them")

    args.views = [view for view in models.VIEWS if view in args.views]  # in one order, once each
    args.weights = parse_weights(args.weights, args.views)
    if args.out is None:
        is_default = args.views == DEFAULT_VIEWS
        args.out = "runs/dual" if is_default else f"runs/{'+'.join(args.views)}"
    has_gpu = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = next((name for name in has_gpu if has_gpu[name]), "cpu")
    available = has_gpu.get(args.device, True)
    data.require(available, "--device", f"{args.device} is not available on this machine")
    if args.amp is None:
        args.amp = args.device == "cuda"
    if args.workers is None:
        args.workers = 4 if args.device == "cuda" else 0
    return args


def parse_weights(texts, views):
    """["ed_es=0"] -> {"ed_es": 0.0}, by name, as positions are easily swapped."""
    pairs = pair_names(views)
    weights = dict.fromkeys(pairs, 1.0)
    for text in texts:
        pair, _, value = text.partition("=")
        rule = f"'{text}' is no PAIR=WEIGHT with one of {', '.join(pairs)} and a weight from 0"
        data.require(pair in pairs and data.parse_number(value) >= 0, "--weights", rule)
        weights[pair] = data.parse_number(value)
    data.require(sum(weights.values()) > 0, "--weights", "must be positive for at least one pair")
    return weights


def pair_names(views):
    """Names of the loss terms that a model with these views has."""
    return [f"{a}_{b}" for a, b in loss.present_pairs(["ecg", *views])]


def start_processes(device):
    """Join the other processes if torchrun started this one: (world size, rank)."""
    if "WORLD_SIZE" not in os.environ:
        return 1, 0
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the main process prepares raw files, for hours perhaps.
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    return dist.get_world_size(), dist.get_rank()


def find_cohort(path, is_main_process):
    """The cohort of --data, made by the main process while the others wait."""
    find = synthetic.default_cohort if path is None else partial(data.find_cohort, path)
    if not dist.is_initialized():
        return find()
    if is_main_process:
        find()
    dist.barrier()
    return find()


def choose_batch_size(batch_size, subjects, world_size):
    """--batch-size, or 64: fewer with fewer subjects, always a multiple of the processes."""
    data.require(subjects >= 2, "--data", f"{subjects} training subjects are too few for contrast")
    if batch_size is None:
        batch_size = min(64, subjects) // world_size * world_size
    fits = 2 <= batch_size <= subjects and batch_size % world_size == 0
    rule = f"{batch_size} must be a multiple of {world_size} processes, at least 2"
    data.require(fits, "--batch-size", f"{rule}, at most {subjects} training subjects")
    return batch_size


# ---------------------------------------------------------------- parts of the loop


def make_optimizer(model, lr, weight_decay):
    """AdamW that decays matrices and kernels, but neither norms nor biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    is_fused = matrices[0].device.type != "mps"
    return torch.optim.AdamW(groups, lr=lr, fused=is_fused)


def warmup_then_cosine(step, args, steps_per_epoch):
    """Factor of the peak rate: linear warm-up, then a cosine to zero (Loshchilov 2017)."""
    epochs_done = step / steps_per_epoch
    if epochs_done < args.warmup_epochs:
        # From 0.02 epochs on, as a first step at rate 0 would be lost.
        return min(1, max(epochs_done, 0.02) / args.warmup_epochs)
    progress = (epochs_done - args.warmup_epochs) / max(1e-9, args.epochs - args.warmup_epochs)
    return (1 + math.cos(math.pi * min(1, progress))) / 2


def ecg_partners(cohort, seed):
    """Whose ECG (N,) stands beside each heart in the control: another subject's of its split."""
    partners = np.arange(len(cohort.ids))
    for split in data.SPLITS:
        indices = cohort.indices(split)
        rng = np.random.default_rng([seed, len(indices)])
        order = rng.permutation(indices)
        partners[order] = np.roll(order, 1)
    return partners


def require_finite(total):
    rule = "made the loss infinite or NaN; lower it, or raise --temperature"
    data.require(math.isfinite(total), "--lr", rule)


def mean_of(rows, weights=None):
    """[{name: value}, …] -> {name: mean value}; weights: of the rows, else equal."""
    names = rows[0]
    return {name: float(np.average([row[name] for row in rows], weights=weights)) for name in names}


@torch.no_grad()
def validate(model, dataset, indices, args):
    """Losses and top-1 retrieval in equal parts of at most a batch, without augmentation.

    Returns {val_total, val_ecg_ed, … in nats, val_top1_ecg_ed, …, val_top1_chance in 0..1}; nothing
    with fewer than 2 subjects.
    """
    if len(indices) < 2:
        return {}
    encode_size = min(len(indices), args.micro_batch or args.batch_size)  # a matter of memory only
    batches = data.plain_batches(dataset, indices, args.device, encode_size, args.workers)
    features = models.extract_features(model, batches)  # {name: (N, 128)}
    embeddings = model.embed(features)
    # Contrast among at most a training batch, so that the loss stands beside ln B.
    parts = np.array_split(np.arange(len(indices)), math.ceil(len(indices) / args.batch_size))
    rows = []
    for part in parts:
        part_embeddings = {name: vectors[part] for name, vectors in embeddings.items()}
        losses = loss.dual_phase_loss(part_embeddings, args.weights, args.temperature)
        require_finite(losses["total"].item())
        row = {f"val_{name}": value.item() for name, value in losses.items()}
        for view in args.views:
            ranks = loss.retrieval_ranks(part_embeddings["ecg"], part_embeddings[view])
            row[f"val_top1_ecg_{view}"] = (ranks == 1).float().mean().item()
        row["val_top1_chance"] = 1 / len(part)
        rows.append(row)
    return mean_of(rows, weights=[len(part) for part in parts])


def describe(row, args):
    """One line an epoch: the loss beside ln B, its terms, validation, top-1 beside chance."""
    terms = " ".join(f"{pair} {row[pair]:.2f}" for pair in pair_names(args.views))
    text = f"epoch {row['epoch']}/{args.epochs} loss {row['total']:.3f}"
    text += f" (ln B {math.log(args.batch_size):.2f}) {terms}"
    if "val_total" in row:
        chance = row["val_top1_chance"]
        text += f" | val {row['val_total']:.3f} (chance {-math.log(chance):.2f}) top-1"
        for view in args.views:
            text += f" {view} {row[f'val_top1_ecg_{view}']:.0%}"
        text += f" (chance {chance:.1%})"
    left = row["seconds"] * (args.epochs - row["epoch"])
    return f"{text} | {row['seconds']:.1f} s, {left:.0f} s left"


# ---------------------------------------------------------------- the run folder


def check_run_folder(args):
    """Make --out where it is not there; refuse to lose a run that is."""
    out = Path(args.out)
    holds_run = (out / "last.pt").exists() or (out / "best.pt").exists()
    rule = "holds a run; add --resume or --overwrite, or give --out"
    data.require(args.resume or args.overwrite or not holds_run, out, rule)
    rule = "has no last.pt, so there is no run to resume; leave --resume out"
    data.require((out / "last.pt").is_file() or not args.resume, out, rule)
    out.mkdir(parents=True, exist_ok=True)


def save_checkpoint(args, cohort, model, optimizer, log):
    """Write last.pt, log.csv and, if this epoch has the lowest validation loss, best.pt."""
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": {**vars(args), "data": str(cohort.folder)},
        "log": log,
        "cohort": cohort.fingerprint,
    }
    out = Path(args.out)
    data.write_csv(out / "log.csv", list(log[-1]), log)
    if len(log) == 1:  # what an overwritten run left is of another model
        for name in ("ecg_encoder.pt", "curves.png"):
            (out / name).unlink(missing_ok=True)
    scores = [row.get("val_total", row["total"]) for row in log]
    if scores[-1] <= min(scores):
        atomic_save(checkpoint, out / "best.pt")
    atomic_save(checkpoint, out / "last.pt")


def atomic_save(content, path):
    """torch.save aside, then rename."""
    buffer = io.BytesIO()  # to a file, torch.save gives no OSError when the disk is full
    torch.save(content, buffer)
    data.atomic_write(path, lambda file: file.write(buffer.getbuffer()))


def resume(args, defaults, cohort, model, optimizer):
    """Load last.pt into model and optimizer; returns the log of the epochs that are done.

    Refuses a run with other arguments; one that the run did not know yet counts as its default.
    """
    path = Path(args.out) / "last.pt"
    saved = data.load_checkpoint(path)
    differing = []
    if saved["cohort"] != cohort.fingerprint:
        differing.append(f"--data was {saved['args']['data']}, or that cohort was made anew")
    for name, value in vars(args).items():
        former = saved["args"].get(name, getattr(defaults, name))
        if name not in FREE_ON_RESUME and value != former:
            differing.append(f"--{name.replace('_', '-')} was {former} and is {value}")
    rule = f"{'; '.join(differing)}; repeat the run's arguments"
    data.require(not differing, "--resume", rule)
    with data.reading(path):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    return saved["log"]


def finish_run(args, cohort, model, log):
    """Write curves.png and ecg_encoder.pt, the best ECG encoder alone, to take elsewhere."""
    best = data.load_checkpoint(Path(args.out) / "best.pt")
    model.cpu().load_state_dict(best["model"])
    atomic_save(model.encoders["ecg"].state_dict(), Path(args.out) / "ecg_encoder.pt")
    draw_curves(args, cohort, log)
    print(f"wrote {args.out}; next: python evaluate.py {args.out}")


def draw_curves(args, cohort, log):
    """curves.png: losses beside ln B, and top-1 retrieval beside chance, over epochs."""
    from matplotlib.figure import Figure  # slow to import, needed only here

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"{args.out} ({cohort.source['kind']} cohort)", parse_math=False)
    loss_axis, top1_axis = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in log]
    for name in log[0]:
        values = [row[name] for row in log]
        if name.startswith("val_top1"):
            top1_axis.plot(epochs, values, label=name)
        elif name.endswith("total") or name in pair_names(args.views):
            loss_axis.plot(epochs, values, label=name)
    loss_axis.axhline(math.log(args.batch_size), color="gray", lw=1, label="ln B (chance)")
    if "val_top1_chance" in log[0]:
        chance = [-math.log(row["val_top1_chance"]) for row in log]
        loss_axis.plot(epochs, chance, "--", color="gray", lw=1, label="chance, validation")
    loss_axis.set_ylabel("InfoNCE (nats)")
    top1_axis.set_ylabel("share of ECGs whose own heart comes first")
    for axis in (loss_axis, top1_axis):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    data.atomic_write(Path(args.out) / "curves.png", partial(figure.savefig, dpi=110, format="png"))


if __name__ == "__main__":
    data.run_command(main)
