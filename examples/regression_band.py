"""Error bars for a regression network: a noisy sine with a gap in its training inputs.

    python -m examples.regression_band --out example-results

The noise is learned together with the prior, without validation data. The uncertainty of the function is large where there
were no data; the noise is the same everywhere.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from examples.common import arguments, figure, save

REGIONS = {"left of the data": (-5, -4), "data": (-4, -1.5), "gap": (-1.5, 1), "more data": (1, 4), "right": (4, 5)}


def train(model, x, y, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model.eval()


def main(argv=None):
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    x = torch.cat([torch.rand(60, 1) * 2.5 - 4, torch.rand(60, 1) * 3 + 1])  # none from -1.5 to 1
    y = (1.5 * x).sin() + 0.2 * torch.randn_like(x)
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    train(model, x, y, steps=50 if args.quick else 1000)

    posterior = kl.KronLaplace(model, "regression").fit(DataLoader(TensorDataset(x, y), batch_size=120)).tune()
    grid = torch.linspace(-5, 5, 401)
    prediction = posterior.predict(grid[:, None])
    mean, function, total = (
        values.detach().flatten()
        for values in (prediction.mean, prediction.variance.sqrt(), prediction.total_variance.sqrt())
    )

    print(f"{'mean std of':17} {'the function':>12} {'a new value':>12}")
    for name, (low, high) in REGIONS.items():
        inside = (grid >= low) & (grid <= high)
        print(f"{name:17} {function[inside].mean():12.2f} {total[inside].mean():12.2f}")

    picture, (axes,) = figure(width=8)
    for std, shade, label in ((total, 0.2, "± 2 std, new value"), (function, 0.35, "± 2 std, function")):
        axes.fill_between(grid, mean - 2 * std, mean + 2 * std, color="C0", alpha=shade, linewidth=0, label=label)
    axes.plot(grid, mean, color="C0", label="mean")
    axes.plot(grid, (1.5 * grid).sin(), "k:", linewidth=1, label="truth")
    axes.scatter(x, y, s=8, color="0.3", zorder=3, label="training data")
    axes.set(xlabel="input", ylabel="target", xlim=(-5, 5), ylim=(-4, 4))
    picture.legend(loc="outside right center", frameon=False)
    save(picture, args, "regression_band.png")


if __name__ == "__main__":
    main()
