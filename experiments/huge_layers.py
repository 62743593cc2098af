"""What it costs to fit, tune and predict with layers of 50,000 rows, and how close what is kept of their factors is.

    python -m experiments.huge_layers --data-dir DATA --out experiment-results/huge_layers

The first table, each row in a process of its own: a head of 512 features for 50,000 classes behind one hidden layer; an
embedding of 50,000 words whose mean a linear layer maps to 50,000 words; a causal language model of one layer of attention
for 50,000 words, on sequences of 8, with a head of its own, or with the weights of the embedding (tied); and a layer with
50,000 inputs. Weights and data are random. `KronLaplace.fit` on 32 examples in batches of 8, `tune`, and `predict` of 8
examples, all without options: seconds, and the peak of the resident memory above that of the process with the loaded
network, as a multiple of the network's own parameters (Linux only: from ``/proc``).

The second table: the error of the evidence's determinants, relative, at prior precisions 0.1, 1 and 10, for a side that is
small enough to be decomposed whole. The sides are the outputs of a language model for 2,000 words, trained on the code of
Python's standard library; the counts of these words in passages of 50; the digits of MNIST, if ``--data-dir`` is given; and
1,500 units of a random hidden layer. Each is the factor of a layer whose other side has 20 eigenvalues from 1e-4 to 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks.sketch import grouped_diagonal, leading_of_sketch, random_columns, side_of_sketch
from kronlaplace.demo.datasets import load
from kronlaplace.demo.report import Column, Table

COST = (
    *(Column(f"{step} seconds", f"{step}, s", 1) for step in ("fit", "tune", "predict")),
    *(Column(f"{step} memory", f"{step}, memory", 2) for step in ("fit", "tune", "predict")),
    Column("parameters", "parameters, MiB", 0),
)
ROWS = 50_000
PRECISIONS = (0.1, 1.0, 10.0)
ERRORS = tuple(Column(f"error {d}", f"error at {d:g}", 4) for d in PRECISIONS)


class Mean(nn.Module):
    """The mean over the words of a text."""

    def forward(self, x):
        return x.mean(1)


class LanguageModel(nn.Module):
    """A causal transformer of one layer."""

    def __init__(self, words, width, length, tied):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return self.head(self.layer(self.words(x) + self.places(places), src_mask=self.mask))


def problem(name, rows=ROWS, n=32):
    """A network, inputs and targets."""
    torch.manual_seed(0)
    if name == "head":
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, rows))
        return model.eval(), torch.randn(n, 512), torch.randint(rows, (n,))
    if name == "words":
        model = nn.Sequential(nn.Embedding(rows, 256), Mean(), nn.Linear(256, rows))
        return model.eval(), torch.randint(rows, (n, 12)), torch.randint(rows, (n,))
    if name in ("language model", "tied language model"):
        model = LanguageModel(rows, 256, 8, name.startswith("tied"))
        return model.eval(), torch.randint(rows, (n, 8)), torch.randint(rows, (n, 8))
    model = nn.Sequential(nn.Linear(rows, 256), nn.ReLU(), nn.Linear(256, 10))
    return model.eval(), torch.randn(n, rows), torch.randint(10, (n,))


NETWORKS = ("head", "words", "language model", "tied language model", "inputs")


def memory(key):
    """A number of ``/proc/self/status``, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def cost(name, rows=ROWS):
    """Seconds and peak memory of `fit`, `tune` and `predict`, in this process."""
    warnings.simplefilter("ignore")
    run(*problem("words", 40), {})  # so that what torch and scipy load is there
    model, x, y = problem(name, rows)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    found = run(model, x, y, {"base": settled(), "size": size})
    return [found[key] for key in ("fit", "tune", "predict", "fit memory", "tune memory", "predict memory")] + [size]


def settled():
    """The resident memory without what can be collected."""
    gc.collect()
    return memory("VmRSS")


def run(model, x, y, found):
    posterior = kl.KronLaplace(model, "classification")
    batches = list(zip(x.split(8), y.split(8), strict=True))
    for key, step in (
        ("fit", lambda: posterior.fit(batches)),
        ("tune", posterior.tune),
        ("predict", lambda: posterior.predict(x[:8])),
    ):
        settled()
        Path("/proc/self/clear_refs").write_text("5")  # starts a new peak
        start = time.perf_counter()
        step()
        found[key] = time.perf_counter() - start
        if "base" in found:
            found[f"{key} memory"] = (memory("VmHWM") - found["base"]) / found["size"]
    return found


def costs(names, rows):
    """One row of the first table for each network, each from a process of its own."""
    scores = {}
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", "experiments.huge_layers", "--one", name, "--rows", str(rows)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        scores[name] = np.array([json.loads(output.splitlines()[-1])])
    return Table(COST, scores)


# -- how close what is kept is -------------------------------------------------------------------------------


def words_of_the_library(n_words):
    """The words of Python's own modules in their order, numbered by how frequent they are; 0 for all rarer ones."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("[a-d]*.py")))
    words = re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", text)
    number = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(n_words - 1))}
    return torch.tensor([number.get(word, 0) for word in words])


def gradient_factor_of_words(words, n_words, n=4000, width=64, context=8, epochs=2):
    """``G`` of the last layer of a network that was trained to say the next word, from ``n`` passages."""
    torch.manual_seed(0)
    x, y = words.unfold(0, context, 1)[:-1], words[context:]
    order = torch.randperm(len(x))[:100_000]
    body = nn.Sequential(nn.Embedding(n_words, width), nn.Flatten(), nn.Linear(context * width, width), nn.Tanh())
    model = nn.Sequential(body, nn.Linear(width, n_words))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in order.split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        pi = model(x[order[:n]]).softmax(1)
        return torch.diag(pi.mean(0)) - pi.T @ pi / n


def moment(x):
    """``1/N Σ x xᵀ``."""
    return x.T @ x / len(x)


def sides(data_dir, n_words=2000):
    """Factors by name, with the number of examples that they are of."""
    words = words_of_the_library(n_words)
    yield "outputs for 2,000 words", gradient_factor_of_words(words, n_words), 4000
    passages = words[: 4000 * 50].view(4000, 50)
    yield (
        "counts of 2,000 words",
        moment(torch.zeros(4000, n_words).scatter_add_(1, passages, torch.ones(4000, 50))),
        4000,
    )
    if data_dir is not None:
        data = load("mnist", data_dir)
        yield "MNIST pixels", moment(data.train_x[:4000].flatten(1)), 4000
    torch.manual_seed(0)
    yield "1,500 hidden units", moment(torch.relu(torch.randn(2000, 784) @ torch.randn(784, 1500) / 28)), 2000


def errors(values, counts, true, n):
    """The relative error of the evidence's determinants with eigenvalues in place of the true ones."""
    other = torch.logspace(-4, 0, 20).double()

    def log_det(values, counts, precision):
        return (torch.log1p(n / precision * values.unsqueeze(1) * other) * counts.unsqueeze(1)).sum()

    ones = torch.ones_like(true)
    exact = [float(log_det(true, ones, d)) for d in PRECISIONS]
    return [float(log_det(values, counts, d)) / e - 1 for d, e in zip(PRECISIONS, exact, strict=True)]


def accuracy(name, matrix, n):
    """The errors of the diagonal, of sketches, and of the one of both that is taken for a sketch of 128 columns."""
    true = torch.linalg.eigvalsh(matrix.double()).clamp_min(0)
    diagonal = matrix.diagonal()

    def of(side):
        if side.vectors.is_floating_point():
            k = side.vectors.shape[1]
            counts = torch.ones(k + 1, dtype=torch.float64)
            counts[0] = len(matrix) - k
        else:
            counts = torch.bincount(side.vectors, minlength=len(side.values)).double()
        return errors(side.values.double(), counts, true, n)

    scores = {f"{name}: diagonal": of(grouped_diagonal(diagonal))}
    for columns in (32, 128, 512):
        test = random_columns(len(matrix), columns, 0, matrix)
        product = matrix @ test
        scores[f"{name}: {columns} columns"] = of(leading_of_sketch(product, test, diagonal))
        if columns == 128:
            taken = side_of_sketch(name, diagonal, product, test)
    kind = "eigenpairs" if taken.vectors.is_floating_point() else "diagonal"
    scores[f"{name}: what is taken"] = scores[f"{name}: {'128 columns' if kind == 'eigenpairs' else 'diagonal'}"]
    return scores


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", type=int, default=ROWS, help="number of words, classes, or inputs")
    parser.add_argument("--skip-accuracy", action="store_true", help="only the first table")
    parser.add_argument("--data-dir", type=Path, help="the folder with mnist/, for a part of the second table")
    parser.add_argument("--one", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("experiment-results/huge_layers"))
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(cost(args.one, args.rows)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    if args.networks:
        tables["cost"] = costs(args.networks, args.rows), f"{args.rows:,} rows, {torch.get_num_threads()} threads"
    if not args.skip_accuracy:
        scores = {}
        for name, matrix, n in sides(args.data_dir):
            scores |= {key: np.array([row]) for key, row in accuracy(name, matrix, n).items()}
        tables["accuracy"] = Table(ERRORS, scores), "relative error of the evidence's determinants"
    for key, (table, title) in tables.items():
        print(f"{title}\n\n{table.to_text()}\n")
        table.write_csv(args.out / f"{key}.csv")
        (args.out / f"{key}.md").write_text(table.to_markdown(title, [f"torch {torch.__version__}"]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
