"""Low-rank adapters: a transformer that was trained on even digits is adapted to odd ones, and gets a posterior.

    python -m examples.lora --out example-results

The weights of the transformer are frozen, and each feed-forward layer and the head get an adapter ``B A`` of rank 4. The
posterior is over what is trained: the table of coverage lists the adapters' blocks. The picture shows how often the network
and the posterior are right when they are sure, on digits of odd classes.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from examples.common import arguments, figure, save

RANK, WIDTH = 4, 32


class Adapted(nn.Module):
    """A linear layer with a low-rank change of its weight, ``W + B A`` (Hu et al. 2022)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Block(nn.Module):
    """One layer of a transformer encoder."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])

    def forward(self, x):
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.feed_forward(self.norms[1](x))


class Transformer(nn.Module):
    """Reads a digit as eight tokens, its rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x) + self.positions).mean(1))


def train(model, loader, epochs, lr):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()


def main(argv=None):
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    even, odd = (torch.where(y % 2 == remainder)[0] for remainder in (0, 1))
    model = Transformer()
    train(model, DataLoader(TensorDataset(x[even], y[even] // 2), 50, shuffle=True), 1 if args.quick else 20, 3e-3)

    model.requires_grad_(False)
    for block in model.blocks:
        block.feed_forward[0], block.feed_forward[2] = (Adapted(block.feed_forward[i]) for i in (0, 2))
    model.head = Adapted(model.head)
    fit, test = odd[:200], odd[200:]
    loader = DataLoader(TensorDataset(x[fit], y[fit] // 2), 50, shuffle=True)
    train(model, loader, 1 if args.quick else 60, 1e-2)

    posterior = kl.KronLaplace(model, "classification").fit(loader).tune()
    print(posterior.fisher.coverage())
    print(posterior.report(DataLoader(TensorDataset(x[test], y[test] // 2), batch_size=200)))

    picture, (axes,) = figure(width=4.5)
    with torch.no_grad():
        predictions = {"network": model(x[test]).softmax(1), "posterior": posterior.predict(x[test])}
    for name, p in predictions.items():
        curve = kl.metrics.reliability_curve(p, y[test] // 2, n_bins=8)
        filled = curve.count >= 10
        axes.plot(curve.confidence[filled], curve.accuracy[filled], marker="o", label=name)
    axes.plot([0.2, 1], [0.2, 1], color="0.7", linestyle="--", label="calibrated")
    axes.set(xlabel="confidence", ylabel="accuracy")
    axes.legend(frameon=False)
    save(picture, args, "lora.png")


if __name__ == "__main__":
    main()
