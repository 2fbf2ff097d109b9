"""Models: one residual network in 1D or 3D; DualPhase, which turns a batch into embeddings.

    features = model(batch)             # {"ecg", "ed", "es": (B, 128)}: what is probed
    embeddings = model.embed(features)  # the same names, (B, 128) unit vectors: what is compared

Encoders never see the batch as a whole (GroupNorm only), so a subject's features do not depend on
its neighbours: micro-batches and several processes then give the features of one big batch.
"""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

GROUPS = 8  # of channels, in every GroupNorm
FEATURES = 128
EMBEDDING = 128

# A view is a CMR latent: which phases its encoder sees, as channels. The paper's are ED and ES.
VIEWS = {"ed": ("ed",), "es": ("es",), "joint": ("ed", "es")}


class Block(nn.Module):
    """Two convolutions beside a shortcut (He 2016); halves every axis and changes the width."""

    def __init__(self, conv, in_channels, out_channels, kernel_size):
        super().__init__()
        pad = kernel_size // 2
        self.conv1 = conv(in_channels, out_channels, kernel_size, 2, padding=pad, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size, padding=pad, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        # No norm on the shortcut: it would divide every ECG by its own size, and with the voltage
        # lose the mass of the heart.
        self.shortcut = conv(in_channels, out_channels, 1, stride=2, bias=False)

    def forward(self, x):  # (B, in_channels, *size) -> (B, out_channels, *size / 2)
        # SiLU is smooth. ReLU would flip on and off with rounding, which differs between
        # micro-batches or processes.
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.silu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Patch stem, residual stages, mean over what is left of the axes: (B, C, *size) -> (B, D)."""

    def __init__(self, conv, in_channels, patch_size, widths, kernel_size):
        super().__init__()
        self.patch_size = patch_size
        # The stem cuts the input into patches: convolutions at full resolution would cost most of
        # the time. No norm behind it, for the reason given at the shortcut.
        self.stem = conv(in_channels, widths[0], patch_size, stride=patch_size)
        blocks = [Block(conv, a, b, kernel_size) for a, b in pairwise(widths)]
        self.stages = nn.Sequential(*blocks)

    def forward(self, x):
        x = pad_to_patches(x, self.patch_size)  # (B, C, *size)
        x = F.silu(self.stem(x))  # (B, widths[0], *size / patch)
        x = self.stages(x)  # (B, D, *size / patch / 2^stages)
        return x.flatten(2).mean(2)  # (B, D)


def pad_to_patches(x, patch_size):
    """Add zeros at the end of each axis until patches cover it: the stem misses no sample."""
    padding = []
    sizes = x.shape[2:]
    for size, patch in zip(reversed(sizes), reversed(patch_size), strict=True):  # last axis first
        padding += [0, -size % patch]
    return F.pad(x, padding) if any(padding) else x


def ecg_encoder():
    """(B, 12, 2500) mV -> stem, 40 ms a patch (B, 32, 250) -> (B, 128, 63) -> mean (B, 128)."""
    return ResNet(nn.Conv1d, 12, patch_size=(10,), widths=(32, 64, FEATURES), kernel_size=5)


def cmr_encoder(phases, slices):
    """(B, phases, 12, 64, 64) -> stem (B, 32, 3, 8, 8) -> (B, 128, 1, 2, 2) -> mean (B, 128).

    A patch is 40 x 24 x 24 mm at the default grid; with fewer than 4 slices, as deep as they are.
    """
    patch_size = (min(4, slices), 8, 8)
    widths = (32, 64, FEATURES)
    encoder = ResNet(nn.Conv3d, phases, patch_size, widths, kernel_size=3)
    return encoder.to(memory_format=torch.channels_last_3d)  # a quarter faster on CPUs


class Head(nn.Module):
    """BatchNorm, then one linear layer without bias: (B, D) -> (B, 128).

    Its statistics are those of the whole global batch, as heads see gathered features. Without
    BatchNorm the loss sits at ln B for epochs: all subjects' features look alike at first.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.linear = nn.Linear(FEATURES, EMBEDDING, bias=False)

    def forward(self, x):
        return self.linear(self.norm(x))


class DualPhase(nn.Module):
    """An ECG encoder and one CMR encoder per view, each with a head of its own.

    ED and ES share no weights: the paper wants distinct latents for structure and for function.
    views: names in VIEWS, perhaps none. slices: how many middle slices CMR encoders see.
    """

    def __init__(self, views, slices):
        super().__init__()
        self.views = tuple(views)
        self.slices = slices
        phases = [phase for view in views for phase in VIEWS[view]]
        self.inputs = ("ecg", *dict.fromkeys(phases))  # what of a batch the model reads
        encoders = {"ecg": ecg_encoder()}
        for view in views:
            encoders[view] = cmr_encoder(len(VIEWS[view]), slices)
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict({name: Head() for name in encoders})

    def forward(self, batch):
        """{"ecg": (B, 12, 2500), "ed", "es": (B, 1, Z, Y, X)} -> features {name: (B, D)}.

        A view is left out where the batch lacks one of its phases: an ECG alone is enough.
        """
        features = {"ecg": self.encode("ecg", batch["ecg"])}
        for view in self.views:
            phases = VIEWS[view]
            if all(phase in batch for phase in phases):
                volume = torch.cat([batch[phase] for phase in phases], dim=1)  # (B, C, Z, Y, X)
                # The bfloat16 3D convolution of torch 2.13 reads memory that nobody wrote on CPUs,
                # so that now and then a gradient is NaN: CMR stays in float32 there.
                with torch.autocast("cpu", enabled=False):
                    features[view] = self.encode(view, middle_slices(volume, self.slices))
        return features

    def encode(self, name, x):
        encoder = self.encoders[name]
        dtype = next(encoder.parameters()).dtype
        return encoder(x).to(dtype)  # autocast's bfloat16 ends here

    def embed(self, features):
        """Features {name: (B, D)} -> unit vectors {name: (B, 128)}."""
        return {name: F.normalize(self.heads[name](x), dim=1) for name, x in features.items()}


def middle_slices(volume, slices):
    """(B, C, Z, Y, X) -> the `slices` slices in the middle of Z."""
    start = max(0, (volume.shape[2] - slices) // 2)
    return volume[:, :, start : start + slices]


def build(args):
    """The model of a run: args.views, args.slices. Nothing else makes one."""
    return DualPhase(args.views, args.slices)


@torch.no_grad()
def extract_features(model, batches):
    """Features of all subjects from a frozen model: {name: (N, D)}, in the order of the batches.

    Leaves the model in evaluation mode, in which heads take their running statistics.
    """
    model.eval()
    encoded = [model(batch) for batch in batches]
    features = {}
    for name in encoded[0]:
        features[name] = torch.cat([batch_features[name] for batch_features in encoded])
    return features
