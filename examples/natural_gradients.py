"""An autoencoder of 8x8 digits, trained with natural gradients and with Adam.

    python -m examples.natural_gradients --out example-results

Both start from the same weights and see the same batches. `kl.NaturalGradient` has no setting; Adam has the best of four
learning rates. The picture shows the loss by update and by second.
"""

import itertools
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import kronlaplace as kl
from examples.common import arguments, figure, save

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def autoencoder():
    torch.manual_seed(0)
    sizes = [64, 50, 25, 6, 25, 50, 64]
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])  # the last outputs are logits of the pixels


def train(x, updates, make):
    """Return the loss and the seconds since the start for each update."""
    model, generator = autoencoder(), torch.Generator().manual_seed(0)
    optimizer = make(model)
    start, losses, seconds = time.perf_counter(), [], []
    for _ in range(updates):
        batch = x[torch.randint(len(x), (250,), generator=generator)]
        optimizer.zero_grad()
        outputs = model(batch)
        if isinstance(optimizer, kl.NaturalGradient):
            optimizer.update_curvature(outputs)
        loss = F.binary_cross_entropy_with_logits(outputs, batch, reduction="sum") / len(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def main(argv=None):
    args = arguments(__doc__, argv)
    updates = 10 if args.quick else 400
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    curves = {"natural gradients": train(x, updates, lambda model: kl.NaturalGradient(model, "binary"))}
    for rate in RATES:
        curves[f"Adam, {rate:g}"] = train(
            x, updates, lambda model, lr=rate: torch.optim.Adam(model.parameters(), lr=lr)
        )
    last = {name: sum(losses[-10:]) / 10 for name, (losses, _) in curves.items()}
    for name, loss in last.items():
        print(f"{name:20} loss of the last ten updates: {loss:.2f}, {curves[name][1][-1]:.1f} s")

    best = min((name for name in last if name.startswith("Adam")), key=last.get)
    picture, panels = figure(columns=2, width=9)
    for name in ("natural gradients", best):
        losses, seconds = curves[name]
        panels[0].plot(losses, label=name)
        panels[1].plot(seconds, losses, label=name)
    for axes, label in zip(panels, ("updates", "seconds"), strict=True):
        axes.set(xlabel=label, ylabel="loss of the batch, nats", ylim=(min(last.values()) - 1, 30))
        axes.legend(frameon=False)
    save(picture, args, "natural_gradients.png")


if __name__ == "__main__":
    main()
