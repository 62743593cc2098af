"""Active learning: which digits should be labeled next?

    python -m examples.active_learning --out example-results

In each round the network is trained on the labels so far, and the images whose labels would tell most about the weights are
labeled: those with the largest mutual information between label and weights (BALD, Houlsby et al. 2011), which is the
epistemic part of `KronLaplace.uncertainty`. The picture compares this with images at random, over several starts.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import kronlaplace as kl
from examples.common import arguments, figure, save

FIRST, MORE = 20, 10


def trained(x, y, updates):
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(updates):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def by_information(model, x, y, pool):
    """Return the images of the pool whose labels tell most about the weights."""
    posterior = kl.KronLaplace(model, "classification").fit([(x, y)]).tune()
    return posterior.uncertainty(pool).epistemic.topk(MORE).indices


def at_random(model, x, y, pool):
    return torch.randperm(len(pool))[:MORE]


def main(argv=None):
    args = arguments(__doc__, argv)
    rounds, starts, updates, n_pool = (2, 1, 20, 100) if args.quick else (12, 5, 200, 1000)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)

    curves = {"most informative": by_information, "at random": at_random}
    picture, (axes,) = figure()
    for name, choose in curves.items():
        accuracies = torch.zeros(starts, rounds)
        for start in range(starts):
            torch.manual_seed(start)
            order = torch.randperm(len(x))
            labeled, pool, test = order[:FIRST], order[FIRST:n_pool], order[1000:]
            for i in range(rounds):
                model = trained(x[labeled], y[labeled], updates)
                with torch.no_grad():
                    accuracies[start, i] = (model(x[test]).argmax(1) == y[test]).float().mean()
                chosen = choose(model, x[labeled], y[labeled], x[pool])
                labeled = torch.cat([labeled, pool[chosen]])
                rest = torch.ones(len(pool), dtype=torch.bool)
                rest[chosen] = False
                pool = pool[rest]
        labels = FIRST + MORE * torch.arange(rounds)
        mean, spread = accuracies.mean(0), accuracies.std(0, correction=0)
        print(f"{name:17} test accuracy with {int(labels[-1])} labels: {mean[-1]:.3f}")
        axes.plot(labels, mean, label=name)
        axes.fill_between(labels, mean - spread, mean + spread, alpha=0.2, linewidth=0)
    axes.set(xlabel="labels", ylabel="test accuracy")
    axes.legend(frameon=False, loc="lower right")
    save(picture, args, "active_learning.png")


if __name__ == "__main__":
    main()
