"""Models: one residual network in 1D or 3D; DualPhase, which turns a batch into embeddings.

    features = model(batch)             # {"ecg", "ed", "es": (B, 128)}: what is probed
    embeddings = model.embed(features)  # the same names, (B, 128) unit vectors: what is compared

Encoders never see the batch as a whole (GroupNorm only), so a subject's features do not depend on
its neighbours: micro-batches and several processes then give the features of one big batch.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

GROUPS, FEATURES, EMBEDDING = 8, 128, 128
CONV = {1: nn.Conv1d, 3: nn.Conv3d}


class Block(nn.Module):
    """Two convolutions beside a shortcut (He 2016); halves every axis and changes the width."""

    def __init__(self, dim, width_in, width_out, kernel):
        super().__init__()
        conv = CONV[dim]
        self.conv1 = conv(width_in, width_out, kernel, stride=2, padding=kernel // 2, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, width_out)
        self.conv2 = conv(width_out, width_out, kernel, padding=kernel // 2, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width_out)
        self.shortcut = conv(width_in, width_out, 1, stride=2, bias=False)

    def forward(self, x):  # (B, width_in, *size) -> (B, width_out, *size / 2)
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.norm2(convolve(y, self.conv2))
        return F.silu(y + self.shortcut(x))


def convolve(x, conv):
    """conv(x) of a centred kernel with stride 1, faster where an axis is one sample long.

    There only the kernel's middle meets the sample; the rest would multiply padding.
    """
    weight, padding = conv.weight, list(conv.padding)
    for axis in (axis for axis, size in enumerate(x.shape[2:]) if size == 1):
        weight, padding[axis] = weight.narrow(2 + axis, weight.shape[2 + axis] // 2, 1), 0
    return (F.conv3d if x.ndim == 5 else F.conv1d)(x, weight, padding=padding)


class ResNet(nn.Module):
    """Patch stem, residual stages, mean over what is left of the axes: (B, C, *size) -> (B, D).

    The stem cuts the input into patches, as convolutions at full resolution would cost most of the
    time: 40 ms of ECG, or 40 x 24 x 24 mm of heart. There is no norm between the stem and the
    shortcuts: it would divide every ECG by its own size, and with the voltage lose the mass of the
    heart. SiLU is smooth: rounding, which differs between micro-batches or processes, flips ReLUs
    on and off.
    """

    def __init__(self, dim, channels, patch, widths, kernel):
        super().__init__()
        self.stem = CONV[dim](channels, widths[0], patch, stride=patch)
        blocks = [Block(dim, a, b, kernel) for a, b in zip(widths, widths[1:], strict=False)]
        self.stages = nn.Sequential(*blocks)

    def forward(self, x):
        x = F.silu(self.stem(x))  # (B, W0, *size / patch)
        x = self.stages(x)  # (B, D, *size / patch / 2^stages)
        return x.flatten(2).mean(2)  # (B, D)


def ecg_encoder():
    """(B, 12, 2500) mV -> stem (B, 32, 250) -> stages (B, 128, 32) -> mean (B, 128)."""
    return ResNet(dim=1, channels=12, patch=10, widths=(32, 48, 64, FEATURES), kernel=5)


def cmr_encoder():
    """(B, 1, 12, 64, 64) grey levels -> stem (B, 32, 3, 8, 8) -> (B, 128, 1, 2, 2) -> (B, 128)."""
    net = ResNet(dim=3, channels=1, patch=(4, 8, 8), widths=(32, 64, FEATURES), kernel=3)
    return net.to(memory_format=torch.channels_last_3d)  # a quarter faster on CPUs with AVX-512


def encode_all(encode, batches, count):
    """encode(batch) of one batch after the other, of `count` subjects in all: {name: (count, D)}.

    Written into place, as small results kept between large ones would fragment the memory.
    """
    whole, start = {}, 0
    for batch in batches:
        found = encode(batch)
        whole = whole or {name: x.new_empty(count, x.shape[1]) for name, x in found.items()}
        for name, x in found.items():
            whole[name][start : start + len(x)] = x
        start += len(x)
    return whole


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
    """An ECG encoder and one CMR encoder per phase, each with a head of its own.

    ED and ES share no weights: the paper wants a latent for structure and one for function.
    """

    def __init__(self, phases=("ed", "es"), amp=False):
        super().__init__()
        self.amp = amp  # bfloat16 inside encoders only; heads and loss stay in float32
        encoders = {"ecg": ecg_encoder(), **{name: cmr_encoder() for name in phases}}
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict({name: Head() for name in self.encoders})

    def forward(self, batch):
        """Batch of data.read_batch -> features {name: (B, D)} before the heads, never bfloat16."""
        kind, features = batch["ecg"].device.type, {}
        for name in (name for name in self.encoders if name in batch):
            # On CPUs, the bfloat16 3D convolution of torch 2.13 reads memory that nobody wrote: now
            # and then a gradient was NaN (32 -> 32 channels at 2 x 4 x 4). CMR is float32 there.
            amp = self.amp and (name == "ecg" or kind != "cpu")
            with torch.autocast(kind, torch.bfloat16, enabled=amp):
                x = self.encoders[name](batch[name])
            features[name] = x.float() if x.dtype == torch.bfloat16 else x
        return features

    def embed(self, features):
        """Features -> unit vectors {name: (B, 128)}."""
        return {name: F.normalize(self.heads[name](x), dim=1) for name, x in features.items()}
