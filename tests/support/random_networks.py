"""Networks drawn at random, small and in float64: `draw` of a seed makes one with data, as in `architectures`."""

import random

import torch
from torch import nn

from tests.support.cases import case
from tests.support.oracles.blocks import norms_written_out

SMOOTH = [nn.Tanh, nn.GELU, nn.Softplus, nn.Sigmoid, nn.SiLU]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Function(nn.Module):
    """A plain function as a step of a network."""

    def __init__(self, name, function):
        super().__init__()
        self.name = name
        self.function = function

    def forward(self, x):
        return self.function(x)

    def extra_repr(self):
        return self.name


class Residual(nn.Module):
    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.Sequential(*steps)

    def forward(self, x):
        return x + self.steps(x)


class Twice(nn.Module):
    """One layer that is used two times."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Attention(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2 if width % 2 == 0 else 1, bias=bias, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x)[0]


class TimeFirst(nn.Module):
    """Runs steps with the time on the first axis."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.Sequential(*steps)

    def forward(self, x):
        return self.steps(x.transpose(0, 1)).transpose(0, 1)


class Drawing:
    """Draws one network.

    Args:
        seed: The seed.
    """

    def __init__(self, seed):
        self.chance = random.Random(seed)
        torch.manual_seed(seed)
        self.outputs = self.chance.randint(1, 3)

    def of(self, *choices):
        return self.chance.choice(choices)

    def activation(self):
        kind = self.chance.random()
        if kind < 0.6:
            return self.of(*SMOOTH)()
        if kind < 0.75:
            return self.of(nn.ReLU, nn.ELU)(inplace=True)
        if kind < 0.85:
            return self.of(
                Function("tanh_", torch.tanh_),
                Function("sigmoid_", torch.sigmoid_),
                Function("mul_", lambda h: h.mul_(0.5)),
                Function("half relu_", _half_relu),
            )
        return self.of(nn.ReLU(), nn.Identity(), nn.Dropout(0.5))

    def linear(self, before, after):
        return nn.Linear(before, after, bias=self.chance.random() < 0.8)

    # -- steps, each as (module, width afterwards) ---------------------------------------------------------------

    def vector_step(self, width):
        after = self.of(2, 3, 4)
        return self.of(
            lambda: (self.linear(width, after), after),
            lambda: (self.linear(width, after), after),
            lambda: (nn.LayerNorm(width), width),
            lambda: (nn.RMSNorm(width), width),
            lambda: (nn.BatchNorm1d(width), width),
            lambda: (Residual(self.linear(width, width), self.activation()), width),
            lambda: (Twice(self.linear(width, width)), width),
        )()

    def convolution(self, d, before, after, **options):
        groups = self.of(1, 1, 1, before) if after % before == 0 else 1
        return CONVOLUTIONS[d](before, after, groups=groups, bias=self.chance.random() < 0.7, **options)

    def image_step(self, d, width):
        after = self.of(2, 3, 4)
        padded = {"kernel_size": 3, "padding": 1, "padding_mode": self.of("zeros", "zeros", "circular", "replicate")}
        return self.of(
            lambda: (self.convolution(d, width, after, **padded), after),
            lambda: (self.convolution(d, width, after, **padded, stride=self.of(1, 2)), after),
            lambda: (self.convolution(d, width, after, kernel_size=3, padding=self.of(2, "same"), dilation=2), after),
            lambda: (self.convolution(d, width, after, kernel_size=1), after),
            lambda: (Residual(self.convolution(d, width, width, **padded), self.activation()), width),
            lambda: (Twice(self.convolution(d, width, width, **padded)), width),
            lambda: (self.batch_norm(d, width), width),
            lambda: (nn.GroupNorm(self.of(1, width), width), width),
            lambda: (INSTANCE_NORMS[d](width, affine=True), width),
            lambda: (POOLS[d](2, ceil_mode=True), width),
            lambda: (Function("mirrored", lambda x: x.transpose(1, -1).contiguous().transpose(1, -1)), width),
        )()

    def batch_norm(self, d, width):
        """Also with something behind it that permutes the axes, and with its input in another order of memory."""
        norm = BATCH_NORMS[d](width)
        if self.chance.random() < 0.5:
            return norm
        flipped = Function("transposed", lambda x: torch.tanh(x.transpose(1, -1)).transpose(1, -1))
        return nn.Sequential(norm, flipped) if self.chance.random() < 0.5 else nn.Sequential(flipped, norm)

    def token_step(self, width):
        after = self.of(2, 3, 4)
        recurrent = self.of(nn.LSTM, nn.GRU, nn.RNN)
        both = self.chance.random() < 0.3
        options = {"batch_first": True, "bidirectional": both, "bias": self.chance.random() < 0.8}
        return self.of(
            lambda: (self.linear(width, after), after),
            lambda: (self.linear(width, after), after),
            lambda: (TimeFirst(self.linear(width, after), self.activation()), after),
            lambda: (Residual(self.linear(width, width), self.activation()), width),
            lambda: (Twice(self.linear(width, width)), width),
            lambda: (nn.LayerNorm(width), width),
            lambda: (nn.RMSNorm(width), width),
            lambda: (Attention(width, self.chance.random() < 0.8), width),
            lambda: (Recurrent(recurrent(width, 2, **options)), 4 if both else 2),
        )()

    # -- networks ------------------------------------------------------------------------------------------------

    def body(self, step, width, n):
        steps = []
        for _ in range(n):
            made, width = step(width)
            steps += [made, self.activation()] if self.chance.random() < 0.7 else [made]
        return steps, width

    def vectors(self):
        start = self.of(2, 3, 4)
        steps, width = self.body(self.vector_step, start, self.of(1, 2, 3))
        return [*steps, self.linear(width, self.outputs)], torch.randn(self.n, start), False

    def images(self):
        d, start = self.of(1, 2, 2, 2, 3), self.of(1, 2, 3)
        size = {1: (7,), 2: self.of((5, 6), (4, 4)), 3: (3, 3, 4)}[d]
        steps, width = self.body(lambda w: self.image_step(d, w), start, self.of(1, 2, 3))
        inputs = torch.randn(self.n, start, *size)
        if d == 2 and self.chance.random() < 0.2:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if d < 3 and self.outputs > 1 and self.chance.random() < 0.15:  # scores for each pixel
            inputs = inputs[..., :3] if d == 1 else inputs[..., :3, :2]
            pads = all(not isinstance(m, (nn.AvgPool1d, nn.AvgPool2d)) for m in steps) and not any(
                isinstance(m, nn.modules.conv._ConvNd) and max(m.stride) > 1 for s in steps for m in s.modules()
            )
            if pads and not any(m.padding == (2,) * d for s in steps for m in s.modules() if hasattr(m, "padding")):
                return [*steps, CONVOLUTIONS[d](width, self.outputs, 1)], inputs, True
        pool = self.of(
            Function("mean", lambda x: x.flatten(2).mean(2)), Function("last", lambda x: x.flatten(2)[..., -1])
        )
        return [*steps, pool, self.linear(width, self.outputs)], inputs, False

    def tokens(self):
        start = self.of(2, 3, 4)
        steps, width = self.body(self.token_step, start, self.of(1, 2, 3))
        if self.chance.random() < 0.4:
            steps = [nn.Embedding(5, start), *steps]
            inputs = torch.randint(5, (self.n, 4))
        else:
            inputs = torch.randn(self.n, 4, start)
        pool = self.of(Function("mean", lambda x: x.mean(1)), Function("last", lambda x: x[:, -1]))
        return [*steps, pool, self.linear(width, self.outputs)], inputs, False

    def network(self):
        self.n = self.of(2, 3, 4)
        steps, inputs, per_pixel = self.of(self.vectors, self.images, self.images, self.tokens)()
        if per_pixel:
            return case(nn.Sequential(*steps), inputs, self.outputs, "regression", per_pixel=True)
        likelihood = self.of("regression", "binary", *(["classification"] * 2 if self.outputs > 1 else []))
        return case(nn.Sequential(*steps), inputs, self.outputs, likelihood)


def _half_relu(h):
    torch.relu_(h[:, :1])
    return h


def draw(seed):
    """A network with data, the first from this seed on that autograd can differentiate: in-place steps may prevent that."""
    while True:
        made = Drawing(seed).network()
        with norms_written_out(made.model):
            outputs = made.model(made.inputs.clone())
        try:
            torch.autograd.grad(outputs.sum(), list(made.model.parameters()), allow_unused=True)
        except RuntimeError:
            seed += 10**7
        else:
            return made
