"""Ten tasks without forgetting: 8x8 digits, with the pixels in another order for each task.

    python -m examples.ten_tasks --out example-results

One network learns the tasks one after another, without the data of the earlier ones. `kl.ContinualLaplace` keeps the
Kronecker factors of all tasks merged into one product per layer, so its memory does not grow. The picture shows the mean
accuracy on all tasks so far, with and without it.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from examples.common import arguments, figure, save


def learn(model, loader, epochs, memory=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if memory is not None:
                loss = loss + memory.penalty() / len(loader.dataset)
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main(argv=None):
    args = arguments(__doc__, argv)
    n_tasks, epochs = (2, 1) if args.quick else (10, 20)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, test = order[:1400], order[1400:]
    pixels = [torch.randperm(64, generator=torch.Generator().manual_seed(task)) for task in range(n_tasks)]

    curves = {}
    for name in ("with the penalty", "without"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        memory = kl.ContinualLaplace(model, "classification", merge="kfoc", strength=10.0)
        curves[name] = []
        for task in range(n_tasks):
            loader = DataLoader(TensorDataset(x[fit][:, pixels[task]], y[fit]), batch_size=50, shuffle=True)
            if name == "without":
                learn(model, loader, epochs)
            else:
                learn(model, loader, epochs, memory)
                memory.consolidate(loader)
            seen = [accuracy(model, x[test][:, p], y[test]) for p in pixels[: task + 1]]
            curves[name].append(sum(seen) / len(seen))
        print(f"{name:18} mean accuracy on all {n_tasks} tasks: {curves[name][-1]:.3f}")

    picture, (axes,) = figure()
    for name, values in curves.items():
        axes.plot(range(1, n_tasks + 1), values, marker="o", label=name)
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on them", ylim=(0, 1.02))
    axes.legend(frameon=False)
    save(picture, args, "ten_tasks.png")


if __name__ == "__main__":
    main()
