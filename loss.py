"""Loss: what compares embeddings across the batch, and gathers them across processes.

dual_phase_loss(embeddings, weights, temperature)   # the paper's loss, each term by name
retrieval_ranks(a, b)                                # where each row's own partner is found
backward(model, stream, ...)                         # gradients of the global batch, in pieces
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

PAIRS = (("ecg", "ed"), ("ecg", "es"), ("ed", "es"))


def info_nce(a, b, temperature):
    """Symmetric InfoNCE of unit vectors a, b (B, D): row k of a belongs to row k of b.

    1/2 [CE(a b^T / t) + CE(b a^T / t)] with the diagonal as the target (van den Oord 2018, Radford
    2021). ln B means chance: each of B candidates is as likely as any other.
    """
    logits = a @ b.T / temperature  # (B, B)
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def dual_phase_loss(embeddings, weights=(1, 1, 1), temperature=0.07):
    """L = sum of w_ab InfoNCE(z_a, z_b) over (ECG, ED), (ECG, ES), (ED, ES).

    embeddings: {"ecg", "ed" and/or "es": (B, D) unit vectors}. Pairs with an absent phase are left
    out, and the other weights rescaled to sum to 1. Returns {"total", "ecg_ed", "ecg_es", "ed_es"}
    in nats for the pairs that are present, unweighted but for the total. Raises ValueError when a
    weight is negative or no present pair has a positive one.
    """
    pairs = {pair: w for pair, w in zip(PAIRS, weights, strict=True) if {*pair} <= {*embeddings}}
    scale = sum(pairs.values())
    rule = "weights must not be negative, and at least one pair present needs a positive one"
    if not scale > 0 or min(weights) < 0:
        raise ValueError(rule)
    terms = {f"{a}_{b}": info_nce(embeddings[a], embeddings[b], temperature) for a, b in pairs}
    total = sum(w / scale * term for w, term in zip(pairs.values(), terms.values(), strict=True))
    return {"total": total, **terms}


@torch.no_grad()
def retrieval_ranks(queries, gallery):
    """Rank (N,) of each query's own partner in the whole gallery; 1 = first by dot product.

    Row k of queries (N, D) belongs to row k of gallery (N, D). Ties count against the query, so
    that a collapsed model does not look perfect. Works through 1,024 queries at a time.
    """
    ranks = []
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ gallery.T  # (<=1024, N)
        own = scores.diagonal(offset=start)[:, None]
        ranks.append((~(scores < own)).sum(dim=1))  # so that NaN ranks last, too
    return torch.cat(ranks)


class Gather(torch.autograd.Function):
    """Rows of all processes in rank order; backward returns the gradient of one's own rows.

    Every process then computes the same full loss, and average_gradients takes the mean over W
    processes. An encoder saw only its own rows in each, so that the mean would be 1/W of the sum
    over rows: hence the factor W. Heads have the full gradient in every process, which averaging
    does not change.
    """

    @staticmethod
    def forward(ctx, rows):  # (B / W, D) -> (B, D)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather(features):
    """{name: (B / W, D)} of this process -> {name: (B, D)} of all; unchanged with one process."""
    if not dist.is_initialized():
        return features
    rows = Gather.apply(torch.stack([*features.values()], dim=1))  # (B, names, D) in one message
    return dict(zip(features, rows.unbind(dim=1), strict=True))


def average_gradients(model):
    """Put in .grad its mean over all processes, in one message; unchanged with one process."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole)
    means = (whole / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def backward(model, stream, pieces, weights, temperature):
    """Accumulate in .grad the gradients of the loss over the global batch; returns its terms.

    stream gives the batch, or this process's part of it, in so many pieces. With more than one,
    memory is that of a piece, and gradients are the same (gradient cache, Gao 2021): encode without
    graph, take the loss over all features and its gradient at the features, then encode each piece
    again, which stream must give a second time in the same order, with graph and send the gradient
    back.
    """
    with torch.set_grad_enabled(pieces == 1):
        encoded = [model(next(stream)) for _ in range(pieces)]
    features = {n: torch.cat([piece[n] for piece in encoded]).requires_grad_() for n in encoded[0]}
    terms = dual_phase_loss(model.embed(gather(features)), weights, temperature)
    terms["total"].backward()
    if pieces > 1:
        sizes = [len(piece["ecg"]) for piece in encoded]
        slopes = {name: x.grad.split(sizes) for name, x in features.items()}
        for k in range(pieces):
            piece = model(next(stream))
            # The gradient of this sum is the loss's at this piece's features.
            sum((piece[name] * slopes[name][k]).sum() for name in piece).backward()
    average_gradients(model)
    return {name: term.detach() for name, term in terms.items()}
