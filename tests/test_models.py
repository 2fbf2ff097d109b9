"""Models: shapes, what reaches the features, and that nothing changes where nothing should."""

import argparse
import copy

import pytest
import torch
import torch.nn as nn

import models

ALL_VIEWS = ("ed", "es", "joint")


def make_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ed, es = torch.rand(2, size, 1, 12, 32, 32, generator=generator)
    return {"ecg": torch.randn(size, 12, 2500, generator=generator), "ed": ed, "es": es}


def make_model(views=ALL_VIEWS, slices=12):
    torch.manual_seed(0)
    return models.build(argparse.Namespace(views=views, slices=slices))


@pytest.mark.parametrize("views", [(), ("ed",), ("es",), ("joint",), ("ed", "es"), ALL_VIEWS])
@pytest.mark.parametrize("slices", [1, 2, 3, 5, 6, 7, 10, 12])
def test_features_and_embeddings_are_named_and_shaped(views, slices):
    model = make_model(views, slices)
    batch = make_batch(3)
    features = model({name: batch[name] for name in model.inputs})  # inputs: what it reads
    embeddings = model.embed(features)
    assert list(features) == list(embeddings) == ["ecg", *views]
    for name in features:
        assert features[name].shape == (3, models.FEATURES)
        assert embeddings[name].shape == (3, models.EMBEDDING)
        torch.testing.assert_close(embeddings[name].norm(dim=1), torch.ones(3))


def test_an_ecg_alone_is_enough():
    """Prediction from a new ECG needs no heart images; joint needs both phases."""
    model = make_model().eval()
    batch = make_batch(2)
    alone = model({"ecg": batch["ecg"]})
    assert list(alone) == ["ecg"]
    torch.testing.assert_close(alone["ecg"], model(batch)["ecg"])
    assert list(model({"ecg": batch["ecg"], "es": batch["es"]})) == ["ecg", "es"]


# ---------------------------------------------------------------- what reaches the features


def reaches(encode, x):
    """Which elements of x the sum of the features depends on."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(encode(x).sum(), x)[0] != 0


@pytest.mark.parametrize("samples", [2500, 2501, 2509, 37])
def test_every_sample_of_an_ecg_reaches_the_features(samples):
    torch.manual_seed(0)
    assert reaches(models.ecg_encoder(), torch.randn(1, 12, samples)).all()


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("slices", [1, 2, 3, 5, 6, 7, 10, 12, 14])
def test_every_voxel_reaches_the_features(phases, slices):
    """Also where patches of 4 x 8 x 8 do not divide the grid."""
    torch.manual_seed(0)
    encoder = models.cmr_encoder(phases, slices)
    assert reaches(encoder, torch.rand(1, phases, slices, 19, 26)).all()


@pytest.mark.parametrize("slices, middle", [
    (1, [5]), (2, [5, 6]), (3, [4, 5, 6]), (5, [3, 4, 5, 6, 7]), (6, [3, 4, 5, 6, 7, 8]),
    (11, list(range(11))), (12, list(range(12))),
])  # fmt: skip
def test_a_model_sees_its_middle_slices_and_nothing_else(slices, middle):
    """Of 12; of those, every voxel of both phases."""
    model = make_model(("joint",), slices)
    batch = make_batch(1)
    for phase in ("ed", "es"):
        is_seen = reaches(lambda x, p=phase: model({**batch, p: x})["joint"], batch[phase])
        share_seen = is_seen.float().mean(dim=(0, 1, 3, 4))  # of each slice
        assert share_seen.tolist() == [float(z in middle) for z in range(12)]


def test_each_encoder_reads_its_own_input():
    """Changing a phase changes its own view and joint; changing the ECG changes no view."""
    model = make_model().eval()
    batch = make_batch(2)
    changes = {"ecg": {"ecg"}, "ed": {"ed", "joint"}, "es": {"es", "joint"}}
    with torch.no_grad():
        before = model(batch)
        for name, expected in changes.items():
            after = model({**batch, name: batch[name].flip(-1)})
            changed = {key for key in before if not torch.equal(before[key], after[key])}
            assert changed == expected


def test_voltage_reaches_the_features():
    """A norm between voltage and features would divide it out, and with it the heart's mass."""
    torch.manual_seed(0)
    encode = models.ecg_encoder()
    ecg = make_batch(4)["ecg"]
    with torch.no_grad():
        assert (encode(2 * ecg) - encode(ecg)).norm() > 0.1 * encode(ecg).norm()


# ---------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_features_do_not_depend_on_neighbours(mode):
    model = getattr(make_model(), mode)()
    batch, other = make_batch(6), make_batch(6, seed=1)
    mixed = {name: torch.cat([batch[name][:2], 100 * other[name][2:]]) for name in batch}
    with torch.no_grad():
        whole, changed = model(batch), model(mixed)
        single = model({name: values[:1] for name, values in batch.items()})
    for name in whole:
        torch.testing.assert_close(changed[name][:2], whole[name][:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(single[name], whole[name][:1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed[name][2:], whole[name][2:], rtol=1e-2)  # it does look


def test_no_batch_statistics_in_any_encoder():
    """BatchNorm or dropout there would spoil micro-batches and several processes."""
    encoders = make_model().encoders
    forbidden = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    assert not any(isinstance(module, forbidden) for module in encoders.modules())
    assert not list(encoders.buffers())


def test_encoders_share_no_weights():
    model = make_model()
    addresses = [parameter.data_ptr() for parameter in model.encoders.parameters()]
    assert len(addresses) == len(set(addresses))
    stems = [model.encoders[phase].stem.weight for phase in ("ed", "es")]
    assert not torch.equal(*stems)  # nor do they start equal


def test_extracting_features_changes_nothing():
    model = make_model()
    batches = [make_batch(2, seed=k) for k in range(3)]
    before = copy.deepcopy(model.state_dict())
    features = models.extract_features(model, batches)
    model.embed(features)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, values in features.items():
        assert values.shape == (6, models.FEATURES) and not values.requires_grad
        torch.testing.assert_close(values[2:4], model(batches[1])[name])  # in order
    model.train()  # and the first comparison can fail: training moves the heads' statistics
    model.embed(features)
    moved = [k for k, value in model.state_dict().items() if not torch.equal(before[k], value)]
    assert moved and all(name.startswith("heads.") for name in moved)


def test_autocast_ends_at_the_features():
    """bfloat16 keeps 8 bits: ECG features within some 0.4 %. On CPUs, CMR stays exact."""
    model = make_model().eval()
    batch = make_batch(4)
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            features = model(batch)
    for name, values in features.items():
        assert values.dtype == torch.float32
        error = (values - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.02 if name == "ecg" else error == 0, name
