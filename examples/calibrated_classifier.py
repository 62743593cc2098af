"""An image classifier that knows when it does not know: a small convolutional network on 8x8 digits, and its posterior.

    python -m examples.calibrated_classifier --out example-results

The network is trained as usual. Its posterior is fitted in one pass over the training data, and tuned without validation
data. The table compares both on test digits; the picture shows how sure they are of digits, and of images that are none.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from examples.common import arguments, figure, save


def train(model, loader, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def main(argv=None):
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    fit, test = order[:400], order[1000:]  # few labels: the network becomes too sure of itself
    loader = DataLoader(TensorDataset(x[fit], y[fit]), batch_size=50, shuffle=True)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    train(model, loader, epochs=2 if args.quick else 30)

    posterior = kl.KronLaplace(model, "classification").fit(loader).tune()
    print(posterior.report(DataLoader(TensorDataset(x[test], y[test]), batch_size=200)))

    noise = torch.rand(500, 1, 8, 8)  # no digits at all
    predictions = {
        "network": lambda inputs: model(inputs).softmax(1),
        "posterior": posterior.predict,
    }
    picture, panels = figure(columns=2, width=8)
    for axes, (name, predict) in zip(panels, predictions.items(), strict=True):
        with torch.no_grad():
            known, unknown = (kl.metrics.predictive_entropy(predict(inputs)) for inputs in (x[test], noise))
        auroc = kl.metrics.ood_auroc(known, unknown)
        print(f"{name}: test digits and noise are told apart with an AUROC of {auroc:.3f}")
        axes.hist([known, unknown], bins=20, range=(0, 2.3), density=True, label=["test digits", "noise"])
        axes.set(title=f"{name}: AUROC {auroc:.2f}", xlabel="entropy of the prediction, nats", ylabel="density")
        axes.legend(frameon=False)
    save(picture, args, "calibrated_classifier.png")


if __name__ == "__main__":
    main()
