"""Small float64 versions of architectures that people train, with data: cases as data, as in `tests.support.networks`."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.cases import case

# -- convolutions --------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Of torchvision: one in-place ReLU module for both places, a residual addition, a projection where shapes change."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, channels, widths, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = widths[0]
        for i, width in enumerate(widths, start=1):
            stage = nn.Sequential(BasicBlock(before, width, 1 if i == 1 else 2), BasicBlock(width, width, 1))
            self.add_module(f"layer{i}", stage)
            before = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, outputs)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(likelihood="classification"):
    return case(ResNet18(1, (2, 2, 3, 3), 3), torch.randn(3, 1, 16, 16), 3, likelihood)


def depthwise(likelihood="classification"):
    """Depthwise-separable convolutions as in MobileNet, and one with two groups."""

    def separable(inputs, outputs, stride):
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        ]

    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1),
        nn.ReLU6(inplace=True),
        *separable(3, 4, 1),
        nn.Conv2d(4, 4, (2, 1), groups=2),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return case(model, torch.randn(4, 1, 7, 6), 3, likelihood)


class Segmentation(nn.Module):
    """Class scores for every pixel, (N, C, H, W), with a path down and up and a connection across."""

    def __init__(self, outputs):
        super().__init__()
        self.encode = nn.Conv2d(1, 2, 3, padding=1)
        self.deep = nn.Conv2d(2, 2, 3, padding=1)
        self.score = nn.Conv2d(4, outputs, 1)

    def forward(self, x):
        wide = torch.relu(self.encode(x))
        deep = torch.relu(self.deep(F.avg_pool2d(wide, 2)))
        deep = F.interpolate(deep, size=wide.shape[2:], mode="bilinear", align_corners=False)
        return self.score(torch.cat([wide, deep], dim=1))


def segmentation(likelihood="classification"):
    return case(Segmentation(3), torch.randn(3, 1, 4, 4), 3, likelihood, per_pixel=True)


class Norms(nn.Module):
    """One of each normalisation with scale and shift."""

    def __init__(self, outputs):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.image = nn.LayerNorm((4, 2, 3), bias=False)
        self.batch = nn.BatchNorm1d(4)
        self.layer = nn.LayerNorm(6)
        self.root = nn.RMSNorm(6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x):
        x = torch.tanh(self.group(self.conv(x)))
        x = self.image(torch.tanh(self.instance(x)) + x)
        x = self.batch(x.flatten(2))
        return self.head(self.root(torch.tanh(self.layer(x))).mean(1))


def norms(likelihood="classification"):
    return case(Norms(3), torch.randn(4, 1, 3, 4), 3, likelihood)


# -- sequences -----------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A pre-norm encoder with learned positions."""

    def __init__(self, vocabulary, length, width, outputs):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 5, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = self.token(tokens) + self.position(positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def transformer(likelihood="classification"):
    return case(Transformer(6, 4, 4, 3), torch.randint(6, (3, 4)), 3, likelihood)


class LSTMClassifier(nn.Module):
    def __init__(self, vocabulary, outputs):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 2)
        self.lstm = nn.LSTM(2, 2, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4, outputs)

    def forward(self, tokens):
        _, (h, _) = self.lstm(self.embedding(tokens))
        return self.head(torch.cat([h[-2], h[-1]], dim=1))


def lstm(likelihood="classification"):
    return case(LSTMClassifier(5, 3), torch.randint(5, (3, 4)), 3, likelihood)


class Recurrent(nn.Module):
    """Time on the first axis inside, examples on the first axis outside."""

    def __init__(self, recurrent, outputs):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size * (1 + recurrent.bidirectional), outputs)

    def forward(self, x):
        sequence, _ = self.recurrent(x.transpose(0, 1))
        return self.head(sequence.mean(0))


def gru(likelihood="classification"):
    return case(Recurrent(nn.GRU(2, 3, bidirectional=True), 3), torch.randn(3, 4, 2), 3, likelihood)


def rnn_tanh(likelihood="classification"):
    return case(Recurrent(nn.RNN(2, 3), 3), torch.randn(4, 5, 2), 3, likelihood)


def rnn_relu(likelihood="classification"):
    return case(Recurrent(nn.RNN(2, 3, 2, nonlinearity="relu", bias=False), 3), torch.randn(4, 3, 2), 3, likelihood)


class Cells(nn.Module):
    """The three cells, called step by step."""

    def __init__(self, outputs):
        super().__init__()
        self.rnn = nn.RNNCell(2, 2, nonlinearity="relu")
        self.gru = nn.GRUCell(2, 2)
        self.lstm = nn.LSTMCell(2, 2)
        self.head = nn.Linear(2, outputs)

    def forward(self, x):
        hidden, gated, state = None, None, None
        for step in x.unbind(1):
            hidden = self.rnn(step, hidden)
            gated = self.gru(hidden, gated)
            state = self.lstm(gated, state)
        return self.head(state[0])


def cells(likelihood="classification"):
    return case(Cells(3), torch.randn(3, 3, 2), 3, likelihood)


# -- unusual wiring ------------------------------------------------------------------------------------------


class FromDict(nn.Module):
    """Batches are dicts, as Hugging Face's are."""

    def __init__(self, outputs):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.extra = nn.Linear(2, 3)
        self.head = nn.Linear(3, outputs)

    def forward(self, batch):
        h = self.embedding(batch["tokens"]).mean(1) + self.extra(batch["extra"])
        return self.head(torch.tanh(h))


def from_dict(likelihood="classification"):
    inputs = {"tokens": torch.randint(5, (4, 3)), "extra": torch.randn(4, 2).double()}
    return case(FromDict(3), inputs, 3, likelihood)


class Reused(nn.Module):
    """One linear layer and one convolution, each used twice."""

    def __init__(self, outputs):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean(1)
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def reused(likelihood="classification"):
    return case(Reused(3), torch.randn(4, 2, 4), 3, likelihood)


class Tied(nn.Module):
    """Two modules with the same weight and bias."""

    def __init__(self, outputs):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(3, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def tied(likelihood="classification"):
    return case(Tied(3), torch.randn(4, 3), 3, likelihood)


class LanguageModel(nn.Module):
    """The output layer's weight is the embedding's; the tokens' scores are averaged."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 3)
        self.mix = nn.Linear(3, 3)
        self.output = nn.Linear(3, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(torch.tanh(self.mix(self.embedding(tokens)))).mean(1)


def language_model(likelihood="classification"):
    return case(LanguageModel(5), torch.randint(5, (4, 3)), 5, likelihood)


ARCHITECTURES = {
    f.__name__: f
    for f in (
        resnet18,
        depthwise,
        segmentation,
        norms,
        transformer,
        lstm,
        gru,
        rnn_tanh,
        rnn_relu,
        cells,
        from_dict,
        reused,
        tied,
        language_model,
    )
}
