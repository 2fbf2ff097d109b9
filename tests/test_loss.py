"""Loss against NumPy and hand-worked numbers; gradients of every path against one plain batch."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import loss
import models

BATCH, WEIGHTS, TEMPERATURE = 24, (3.0, 2.0, 1.0), 0.07
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


# ---------------------------------------------------------------- the loss itself


def info_nce_numpy(a, b, temperature):
    """Transcribed from the paper in float64: each row of a against all of b, and the reverse."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    total = 0.0
    for queries, keys in ((a, b), (b, a)):
        for i in range(len(a)):
            scores = np.array([queries[i] @ keys[j] / temperature for j in range(len(a))])
            total -= np.log(np.exp(scores[i]) / np.exp(scores).sum()) / len(a)
    return total / 2


def unit_rows(count, size=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, size, generator=generator, dtype=torch.float64)).to(dtype)


def three_views(count=7, dtype=torch.float64):
    return {
        name: unit_rows(count, seed=k, dtype=dtype) for k, name in enumerate(("ecg", "ed", "es"))
    }


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_info_nce_is_the_formula(dtype, tolerance, temperature):
    a, b = unit_rows(9, seed=1, dtype=dtype), unit_rows(9, seed=2, dtype=dtype)
    wanted = info_nce_numpy(a, b, temperature)
    assert loss.info_nce(a, b, temperature).item() == pytest.approx(wanted, rel=tolerance)


def test_info_nce_by_hand():
    """exp(logits) = [[2 1 1] [3 4 1] [1 1 6]], so

    rows find their own with 2/4, 4/8, 6/8 and columns with 2/6, 4/6, 6/8; the mean of the six
    -ln p is ln(2 * 2 * 4/3 * 3 * 3/2 * 4/3) / 6 = ln(32) / 6 = 0.577623.
    """
    temperature = 0.5
    odds = torch.tensor([[2.0, 1, 1], [3, 4, 1], [1, 1, 6]])
    value = loss.info_nce(torch.eye(3), temperature * odds.log().T, temperature)
    assert value.item() == pytest.approx(0.577623, abs=1e-6)


@pytest.mark.parametrize("count", [2, 64, 1000])
def test_info_nce_at_chance_is_ln_b(count):
    same = torch.ones(count, 4) / 2
    assert loss.info_nce(same, same, 0.07).item() == pytest.approx(math.log(count), rel=1e-6)


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 2, 1), (0.5, 0, 7)])
def test_weights_reach_the_named_pair(weights):
    views = three_views()
    got = loss.dual_phase_loss(views, weights, 0.2)
    wanted = {
        "ecg_ed": info_nce_numpy(views["ecg"], views["ed"], 0.2),
        "ecg_es": info_nce_numpy(views["ecg"], views["es"], 0.2),
        "ed_es": info_nce_numpy(views["ed"], views["es"], 0.2),
    }
    assert len({round(value, 3) for value in wanted.values()}) == 3  # a swap would show
    wanted["total"] = np.dot(weights, list(wanted.values())) / sum(weights)
    assert {name: value.item() for name, value in got.items()} == pytest.approx(wanted)


@pytest.mark.parametrize("order", [("es", "ed", "ecg"), ("ed", "ecg", "es")])
def test_the_order_of_the_embeddings_does_not_matter(order):
    views = three_views()
    turned = loss.dual_phase_loss({name: views[name] for name in order}, (3, 2, 1), 0.2)
    wanted = loss.dual_phase_loss(views, (3, 2, 1), 0.2)
    assert all(torch.equal(turned[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("phase", ["ed", "es"])
def test_absent_phase_is_left_out(phase):
    views = three_views()
    got = loss.dual_phase_loss({"ecg": views["ecg"], phase: views[phase]}, (5, 7, 11), 0.2)
    wanted = info_nce_numpy(views["ecg"], views[phase], 0.2)
    assert {name: v.item() for name, v in got.items()} == pytest.approx(
        {"total": wanted, f"ecg_{phase}": wanted}
    )


@pytest.mark.parametrize("weights, phases", [
    ((0, 0, 0), ("ed", "es")), ((-1, 1, 1), ("ed", "es")), ((1, 1, -0.1), ("ed", "es")),
    ((0, 1, 1), ("ed",)), ((1, 0, 1), ("es",)), ((math.nan, 1, 1), ("ed", "es")),
])  # fmt: skip
def test_impossible_weights_are_refused(weights, phases):
    views = {name: rows for name, rows in three_views().items() if name in ("ecg", *phases)}
    with pytest.raises(ValueError, match="weights"):
        loss.dual_phase_loss(views, weights)


# ---------------------------------------------------------------- retrieval


def test_ranks_by_hand():
    """Rows of scores: the own one is first; second; as good as another, which counts against it."""
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.2, 0.7, 0.7]])
    assert loss.retrieval_ranks(scores, torch.eye(3)).tolist() == [1, 2, 2]


def test_a_collapsed_model_does_not_look_perfect():
    same = F.normalize(torch.ones(50, 8), dim=1)
    assert loss.retrieval_ranks(same, same).tolist() == [50] * 50
    broken = torch.full((50, 8), math.nan)
    assert loss.retrieval_ranks(broken, broken).tolist() == [50] * 50


def test_ranks_in_chunks_equal_the_full_matrix():
    """More than 1,024 rows, and small whole numbers, so that there are ties and no rounding."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randint(-3, 4, (2, 2500, 6), generator=generator).float()
    scores = queries.numpy() @ gallery.numpy().T
    wanted = (scores >= np.diag(scores)[:, None]).sum(axis=1)
    assert len(set(wanted)) > 100
    assert loss.retrieval_ranks(queries, gallery).tolist() == wanted.tolist()


# ---------------------------------------------------------------- gradients


def make_batch(dtype):
    """Small inputs, as encoders take any size; subjects differ much, so that errors show."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"ecg": (12, 500), "ed": (1, 8, 32, 32), "es": (1, 8, 32, 32)}
    batch = {
        name: torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    gains = torch.linspace(0.2, 3, BATCH, dtype=torch.float64)
    return {name: (x * gains.view(-1, *[1] * (x.ndim - 1))).to(dtype) for name, x in batch.items()}


def make_model(dtype):
    torch.manual_seed(0)
    return models.DualPhase().to(dtype).train()


def state_after(model):
    """Gradient of every parameter, and every buffer (the heads' running statistics)."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"gradients": gradients, "buffers": dict(model.named_buffers())}


def plain(dtype):
    """The reference: the whole batch at once, the formula written out, torch's own autograd."""
    model = make_model(dtype)
    views = model.embed(model(make_batch(dtype)))
    total = 0
    for (a, b), weight in zip((("ecg", "ed"), ("ecg", "es"), ("ed", "es")), WEIGHTS, strict=True):
        logits = views[a] @ views[b].T / TEMPERATURE
        both = logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()
        total = total - weight / sum(WEIGHTS) * both.mean() / 2
    total.backward()
    return state_after(model) | {"loss": total.detach()}


def cached(dtype, micro_batch, rank=0, world=1):
    """loss.backward as train.py calls it, in one process or as one of several."""
    model, batch = make_model(dtype), make_batch(dtype)
    own = {name: rows.chunk(world)[rank] for name, rows in batch.items()}
    cut = {name: rows.split(micro_batch or BATCH) for name, rows in own.items()}
    pieces = [dict(zip(cut, piece, strict=True)) for piece in zip(*cut.values(), strict=True)]
    stream = iter(pieces * min(len(pieces), 2))
    terms = loss.backward(model, stream, len(pieces), WEIGHTS, TEMPERATURE)
    assert next(stream, None) is None
    return state_after(model) | {"loss": terms["total"]}


def errors(got, wanted, kind="gradients"):
    """Relative error of each parameter: largest difference over largest value."""
    assert got[kind].keys() == wanted[kind].keys()
    return {
        name: ((got[kind][name] - value).abs().max() / value.abs().max()).item()
        for name, value in wanted[kind].items()
    }


def assert_exact(got, wanted, dtype):
    assert min(value.abs().max() for value in wanted["gradients"].values()) > 0
    for kind in ("gradients", "buffers"):
        wrong = {k: e for k, e in errors(got, wanted, kind).items() if not e <= TOLERANCE[dtype]}
        assert not wrong, kind
    assert got["loss"].item() == pytest.approx(wanted["loss"].item(), rel=TOLERANCE[dtype])


@pytest.fixture(scope="module")
def reference():
    return {dtype: plain(dtype) for dtype in TOLERANCE}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("micro_batch", [0, 1, 4, 5, 8, 13, 23, 24, 64])
def test_micro_batches_give_the_gradients_of_the_whole_batch(reference, dtype, micro_batch):
    assert_exact(cached(dtype, micro_batch), reference[dtype], dtype)


def test_plain_accumulation_would_be_caught(reference):
    """What many codes do instead: the mean over pieces, each contrasted within itself only."""
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    for k in range(0, BATCH, 8):
        piece = {name: rows[k : k + 8] for name, rows in batch.items()}
        terms = loss.dual_phase_loss(model.embed(model(piece)), WEIGHTS, TEMPERATURE)
        (terms["total"] / 3).backward()
    wrong = errors(state_after(model), reference[torch.float64])
    assert min(wrong.values()) > 0.01


# Case: dtype, micro-batch, fault. Parts of 12 or 8 rows a process: 4 divides them, 5 does not.
CASES = [(dtype, micro, "") for dtype in TOLERANCE for micro in (0, 4, 5)]
FAULTS = ("gather without gradient", "gather without the factor", "no gather")
FAULTY = [(torch.float64, micro, fault) for micro in (0, 4) for fault in FAULTS]


def one_of_several(rank, world, folder):
    """Body of one process: all cases in turn, the results to a file."""
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    results, gather, gather_backward = {}, loss.gather, loss.Gather.backward
    for dtype, micro_batch, fault in CASES if world == 3 else CASES + FAULTY:
        if fault == "gather without gradient":
            loss.Gather.backward = staticmethod(
                lambda ctx, g: torch.zeros_like(g.chunk(world)[rank])
            )
        elif fault == "gather without the factor":
            loss.Gather.backward = staticmethod(lambda ctx, g: g.chunk(world)[rank])
        elif fault == "no gather":
            loss.gather = lambda features: features
        results[dtype, micro_batch, fault] = cached(dtype, micro_batch, rank, world)
        loss.gather, loss.Gather.backward = gather, gather_backward
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=(3, 2))
def processes(request, tmp_path_factory):
    """The results of every case, of the first and the last process."""
    folder = tmp_path_factory.mktemp("processes")
    world = request.param
    torch.multiprocessing.start_processes(
        one_of_several, (world, folder), nprocs=world, start_method="forkserver"
    )
    ranks = (0, world - 1)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in ranks]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("micro_batch", [0, 4, 5])
def test_processes_give_the_gradients_of_the_whole_batch(processes, reference, dtype, micro_batch):
    for results in processes:
        assert_exact(results[dtype, micro_batch, ""], reference[dtype], dtype)


@pytest.mark.parametrize("processes", [2], indirect=True)
@pytest.mark.parametrize("micro_batch", [0, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_gather_would_be_caught(processes, reference, fault, micro_batch):
    """The loss value alone would not tell: with the first two faults it is the right one."""
    got, wanted = processes[0][torch.float64, micro_batch, fault], reference[torch.float64]
    wrong = errors(got, wanted)
    assert min(e for name, e in wrong.items() if name.startswith("encoders.")) > 0.1
    if fault != "no gather":
        assert got["loss"].item() == pytest.approx(wanted["loss"].item())
        assert max(e for name, e in wrong.items() if name.startswith("heads.")) < 1e-10
