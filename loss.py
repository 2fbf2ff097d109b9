"""Loss: what compares embeddings across the batch, and across processes.

dual_phase_loss(embeddings, weights, temperature)    # the paper's loss, each term by name
global_batch_backward(model, batch, micro_batch, …)  # its gradients, for batches too large for one
                                                     # forward pass or spread over processes
retrieval_ranks(queries, gallery)                    # where each query finds its own partner
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

# The paper's terms are (ECG, ED), (ECG, ES) and (ED, ES). A pair counts where both are present.
PAIRS = (("ecg", "ed"), ("ecg", "es"), ("ecg", "joint"), ("ed", "es"))


def present_pairs(names):
    """Those of PAIRS of which both are among the names."""
    return [(a, b) for a, b in PAIRS if a in names and b in names]


def info_nce(a, b, temperature):
    """Symmetric InfoNCE in nats of unit vectors a, b (B, D): row k of a belongs to row k of b.

    1/2 [CE(a b^T / τ) + CE(b a^T / τ)] with the diagonal as target (van den Oord 2018; Radford
    2021). Chance is ln B: each of the B candidates is as likely as any other.
    """
    logits = a @ b.T / temperature  # (B, B): cosine similarities over τ
    targets = torch.arange(len(a), device=a.device)
    a_to_b = F.cross_entropy(logits, targets)
    b_to_a = F.cross_entropy(logits.T, targets)
    return (a_to_b + b_to_a) / 2


def dual_phase_loss(embeddings, weights=None, temperature=0.07):
    """L = Σ w_ab InfoNCE(z_a, z_b) / Σ w_ab over the PAIRS that are present.

    embeddings: {"ecg", "ed", "es", "joint": (B, D) unit vectors}, those that the model has.
    weights: {"ecg_ed": w, …}; a pair that is not named weighs 1, so that the paper's thirds are the
    default. Returns {"total", "ecg_ed", …} in nats, the terms unweighted. Raises ValueError when a
    weight is negative or no present pair has a positive one.
    """
    weights = weights or {}
    losses = {}
    weighted_sum = 0.0
    weight_sum = 0.0
    for a, b in present_pairs(embeddings):
        pair = f"{a}_{b}"
        weight = weights.get(pair, 1.0)
        if not weight >= 0:  # true for NaN, too
            raise ValueError(f"weight of {pair} must not be negative")
        losses[pair] = info_nce(embeddings[a], embeddings[b], temperature)
        weighted_sum = weighted_sum + weight * losses[pair]
        weight_sum = weight_sum + weight
    if weight_sum == 0:
        raise ValueError("weights must be positive for at least one pair that is present")
    losses["total"] = weighted_sum / weight_sum
    return losses


@torch.no_grad()
def retrieval_ranks(queries, gallery):
    """Rank (N,) of each query's own partner in the whole gallery; 1 = first by dot product.

    Row k of queries (N, D) belongs to row k of gallery (N, D). Ties count against the query, so
    that a collapsed model does not look perfect. Works through 1,024 queries at a time.
    """
    ranks = []
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ gallery.T  # (<= 1024, N)
        partner_scores = scores.diagonal(offset=start)[:, None]
        not_worse = ~(scores < partner_scores)  # true for NaN, too: a broken model ranks last
        ranks.append(not_worse.sum(dim=1))
    return torch.cat(ranks)


# ---------------------------------------------------------------- large and distributed batches


def global_batch_backward(model, batch, micro_batch, autocast, weights, temperature):
    """Put in .grad the gradients of the loss over the global batch; returns its losses, detached.

    batch: this process's share of the global batch. micro_batch: how many pairs to encode at a
    time. Every ECG sees all hearts of the global batch as negatives, with the memory of one
    micro-batch: the graph is cut at the features (gradient cache, Gao 2021). That is exact because
    encoders have no batch statistics: a subject's features do not depend on its neighbours.
    autocast: the context of the encoders' forward pass.
    """
    chunks = split_batch(batch, micro_batch)

    # 1. Encode all subjects without a graph, and gather them from all processes.
    features = {}
    with torch.no_grad(), autocast:
        encoded = [model(chunk) for chunk in chunks]
    for name in encoded[0]:
        local_features = torch.cat([chunk_features[name] for chunk_features in encoded])
        features[name] = gather(local_features).requires_grad_()  # (B, D), leaves of a new graph

    # 2. Heads and loss over the global batch. Each leaf's .grad becomes dL/dfeatures (B, D), and
    #    the heads' gradients are whole: every process has seen all rows.
    losses = dual_phase_loss(model.embed(features), weights, temperature)
    losses["total"].backward()

    # 3. Encode again, with a graph, and send each chunk its rows of dL/dfeatures back.
    first = len(batch["ecg"]) * process_rank()
    for k, chunk in enumerate(chunks):
        with autocast:
            chunk_features = model(chunk)
        start = first + k * micro_batch
        rows = slice(start, start + len(chunk["ecg"]))  # of this chunk in the global batch
        feature_grads = [features[name].grad[rows] for name in chunk_features]
        torch.autograd.backward(list(chunk_features.values()), feature_grads)

    # 4. An encoder has seen this process's rows only: the sum over processes is its gradient.
    sum_gradients(model.encoders)
    return {name: value.detach() for name, value in losses.items()}


def split_batch(batch, size):
    """{name: (B, …)} -> a list of batches of at most `size` subjects, as views."""
    starts = range(0, len(batch["ecg"]), size)
    return [{name: x[start : start + size] for name, x in batch.items()} for start in starts]


def process_rank():
    """Number of this process among those of torchrun; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(features):
    """(B / world size, D) of each process -> (B, D) in the order of ranks, without a graph."""
    if not dist.is_initialized():
        return features
    gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, features.contiguous())
    return torch.cat(gathered)


def sum_gradients(module):
    """Replace every .grad by its sum over all processes, in one message."""
    if not dist.is_initialized():
        return
    grads = [parameter.grad for parameter in module.parameters()]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    sizes = [grad.numel() for grad in grads]
    for grad, summed in zip(grads, flat.split(sizes), strict=True):
        grad.copy_(summed.view_as(grad))
