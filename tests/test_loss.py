"""Loss against NumPy and hand-worked numbers; gradients of every path against one plain batch."""

import functools
import math
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import loss
import models

BATCH = 24
TEMPERATURE = 0.07
WEIGHTS = {"ecg_ed": 3.0, "ecg_joint": 0.5, "ed_es": 2.0}  # ecg_es is not named: 1
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
multiprocessing.set_forkserver_preload(["models"])  # imports torch once for all processes


def info_nce_numpy(a, b, temperature):
    """Transcribed from the paper in float64: each row of a against all of b, and the reverse."""
    total = 0.0
    a, b = a.double().numpy(), b.double().numpy()
    for queries, keys in ((a, b), (b, a)):
        for i, query in enumerate(queries):
            odds = np.exp([query @ key / temperature for key in keys])
            total -= np.log(odds[i] / odds.sum()) / len(a)
    return total / 2


def unit_rows(seed, dtype=torch.float64):
    rows = np.random.default_rng(seed).normal(size=(7, 16))
    return F.normalize(torch.from_numpy(rows)).to(dtype)


def embeddings_of(names):
    """Each name has rows of its own, so that a swap of two would show."""
    return {name: unit_rows("ecg ed es joint".index(name)) for name in names.split()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_info_nce_is_the_formula(dtype, tolerance, temperature):
    a, b = unit_rows(1, dtype), unit_rows(2, dtype)
    expected = info_nce_numpy(a, b, temperature)
    assert loss.info_nce(a, b, temperature).item() == pytest.approx(expected, rel=tolerance)


def test_info_nce_by_hand():
    # Rows find their own with 2/4, 4/8, 6/8 and columns with 2/6, 4/6, 6/8: the mean of the six
    # -ln p is ln(2 * 2 * 4/3 * 3 * 3/2 * 4/3) / 6 = ln(32) / 6 = 0.577623.
    odds = torch.tensor([[2.0, 1, 1], [3, 4, 1], [1, 1, 6]])
    value = loss.info_nce(torch.eye(3), 0.5 * odds.log().T, temperature=0.5)
    assert value.item() == pytest.approx(0.577623, abs=1e-6)


@pytest.mark.parametrize("count", [2, 64, 1000])
def test_info_nce_at_chance_is_ln_b(count):
    same = torch.ones(count, 4) / 2
    assert loss.info_nce(same, same, 0.07).item() == pytest.approx(math.log(count), rel=1e-6)


@pytest.mark.parametrize("names, weights, expected", [
    ("ecg ed es", {}, {"ecg_ed": 1, "ecg_es": 1, "ed_es": 1}),
    ("es ecg ed", {"ecg_es": 5}, {"ecg_ed": 1, "ecg_es": 5, "ed_es": 1}),
    ("ecg ed es", {"ed_es": 0, "ecg_ed": 3}, {"ecg_ed": 3, "ecg_es": 1, "ed_es": 0}),
    ("ecg ed", {"ecg_es": 7}, {"ecg_ed": 1}),
    ("ecg es", {"ecg_es": 7}, {"ecg_es": 7}),
    ("joint es ecg", {"ecg_joint": 3}, {"ecg_es": 1, "ecg_joint": 3}),
])  # fmt: skip
def test_weights_reach_the_named_pair(names, weights, expected):
    """expected: the weight of each pair that counts; absent ones are not in the result."""
    embeddings = embeddings_of(names)
    losses = loss.dual_phase_loss(embeddings, weights, 0.2)
    terms = {}
    for pair in expected:
        a, b = pair.split("_")
        terms[pair] = info_nce_numpy(embeddings[a], embeddings[b], 0.2)
    terms["total"] = np.average(list(terms.values()), weights=list(expected.values()))
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(terms)


@pytest.mark.parametrize("names, weights", [
    ("ecg ed es", {"ecg_ed": 0, "ecg_es": 0, "ed_es": 0}),
    ("ecg ed es", {"ecg_ed": -1}),
    ("ecg ed es", {"ecg_es": math.nan}),
    ("ecg ed", {"ecg_ed": 0}),
    ("ecg", {}),  # no pair at all
])  # fmt: skip
def test_impossible_weights_are_refused(names, weights):
    with pytest.raises(ValueError, match="weight"):
        loss.dual_phase_loss(embeddings_of(names), weights)


def test_ranks_by_hand():
    """Rows of scores: the own one is first; second; as good as another, which counts against it."""
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.2, 0.7, 0.7]])
    assert loss.retrieval_ranks(scores, torch.eye(3)).tolist() == [1, 2, 2]


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_or_broken_model_does_not_look_perfect(value):
    same = torch.full((50, 8), value)
    assert loss.retrieval_ranks(same, same).tolist() == [50] * 50


def test_ranks_in_chunks_equal_the_full_matrix():
    """More than two chunks, and small whole numbers, so that there are ties and no rounding."""
    queries, gallery = np.random.default_rng(0).integers(-3, 4, (2, 2500, 6)).astype("float32")
    scores = queries @ gallery.T
    expected = (scores >= np.diag(scores)[:, None]).sum(axis=1).tolist()
    assert loss.retrieval_ranks(*map(torch.from_numpy, (queries, gallery))).tolist() == expected


# ---------------------------------------------------------------- gradients


def make_batch(dtype, device="cpu"):
    """Small inputs, as encoders take any size; subjects differ much, so that errors show."""
    rng = np.random.default_rng(0)
    ecg = rng.normal(size=(BATCH, 12, 200)) * np.linspace(0.2, 3, BATCH)[:, None, None]
    ed, es = rng.normal(size=(2, BATCH, 1, 8, 16, 16)) * rng.uniform(0.2, 3, (BATCH, 1, 1, 1, 1))
    arrays = zip(("ecg", "ed", "es"), (ecg, ed, es), strict=True)
    return {name: torch.from_numpy(array).to(device, dtype) for name, array in arrays}


def make_model(dtype, device="cpu"):
    torch.manual_seed(0)
    return models.DualPhase(("ed", "es", "joint"), slices=8).to(device, dtype).train()


def state_of(model, total):
    """Gradient of every parameter, every buffer (the heads' running statistics), the loss."""
    state = {f"grad {name}": value.grad.cpu() for name, value in model.named_parameters()}
    state.update({name: value.cpu() for name, value in model.named_buffers()})
    return {**state, "loss": total.detach().cpu()}


@functools.cache
def plain_batch(dtype, device="cpu"):
    """The reference: the whole batch at once, the formula written out, torch's own autograd."""
    model = make_model(dtype, device)
    embeddings = model.embed(model(make_batch(dtype, device)))
    total = 0
    for pair, weight in {**WEIGHTS, "ecg_es": 1.0}.items():
        a, b = pair.split("_")
        logits = embeddings[a] @ embeddings[b].T / TEMPERATURE
        log_p = logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()
        total = total - weight / 6.5 * log_p.mean() / 2
    total.backward()
    return state_of(model, total)


def global_batch(dtype, micro_batch, rank=0, world_size=1, device="cpu"):
    """loss.global_batch_backward as train.py calls it, in one process or as one of several."""
    model, batch = make_model(dtype, device), make_batch(dtype, device)
    share = {name: values.chunk(world_size)[rank] for name, values in batch.items()}
    exact = torch.autocast("cpu", enabled=False)
    losses = loss.global_batch_backward(model, share, micro_batch, exact, WEIGHTS, TEMPERATURE)
    return state_of(model, losses["total"])


def errors(state, expected):
    """{name: largest difference over largest value}; nan where all expected values are 0."""
    worst = {name: (state[name] - value).abs().max() for name, value in expected.items()}
    return {name: (error / expected[name].abs().max()).item() for name, error in worst.items()}


def assert_exact(state, dtype):
    for name, error in errors(state, plain_batch(dtype)).items():
        assert error <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 13, 24, 64])
def test_micro_batches_give_the_gradients_of_the_whole_batch(dtype, micro_batch):
    assert_exact(global_batch(dtype, micro_batch), dtype)


def test_plain_accumulation_would_be_caught():
    """What many codes do instead: the mean over pieces, each contrasted within itself only."""
    model = make_model(torch.float64)
    for piece in loss.split_batch(make_batch(torch.float64), 8):
        losses = loss.dual_phase_loss(model.embed(model(piece)), WEIGHTS, TEMPERATURE)
        (losses["total"] / 3).backward()
    wrong = errors(state_of(model, losses["total"]), plain_batch(torch.float64))
    assert min(error for name, error in wrong.items() if name.startswith("grad")) > 0.01


# In shares of 12 or 8 subjects a process: micro-batches of 4 divide them, those of 5 do not.
CASES = [(dtype, micro_batch) for dtype in TOLERANCE for micro_batch in (4, 5, 24)]


def run_process(rank, world_size, folder, device="cpu"):
    """Body of one process: all cases, then two faulty sums; the results go to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meeting", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    states = {case: global_batch(*case, rank, world_size, device) for case in CASES}
    sum_gradients = loss.sum_gradients

    def average_gradients(module):
        sum_gradients(module)
        for parameter in module.parameters():
            parameter.grad.div_(world_size)

    for fault, function in (("no sum", lambda module: None), ("mean", average_gradients)):
        loss.sum_gradients = function
        states[fault] = global_batch(torch.float64, 4, rank, world_size, device)
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=(2, 3))
def processes(request, tmp_path_factory):
    """The states of every case, of the first and the last process."""
    folder = tmp_path_factory.mktemp("processes")
    n = request.param
    torch.multiprocessing.start_processes(run_process, (n, folder), n, start_method="forkserver")
    ranks = (0, n - 1)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in ranks]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_give_the_gradients_of_the_whole_batch(processes, case):
    for states in processes:
        assert_exact(states[case], case[0])


@pytest.mark.parametrize("fault", ["no sum", "mean"])
def test_faulty_sums_over_processes_would_be_caught(processes, fault):
    """The loss value would not tell: it is the right one, and so are the heads' gradients."""
    for states in processes:
        wrong = errors(states[fault], plain_batch(torch.float64))
        assert wrong["loss"] < 1e-10
        assert max(error for name, error in wrong.items() if "heads" in name) < 1e-10
        assert min(error for name, error in wrong.items() if "grad encoders" in name) > 0.1
