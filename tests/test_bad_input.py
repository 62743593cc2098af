"""Bad input gets one clear error, before or in the middle of a fit, and nothing half-changed stays behind."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from tests.support.bad_input import NAN, X, Y, mlp32, poisoned
from tests.support.networks import cnn, mlp


def iterator():
    yield from ()


BAD_DATA = {
    "empty list": ([], ValueError, "the data is empty: the loader yielded no batches"),
    "empty loader": (DataLoader(TensorDataset(X[:0], Y[:0])), ValueError, "the data is empty"),
    "spent iterator": (iterator(), ValueError, "An iterator can be read only once"),
    "not iterable": (7, TypeError, "data must be an iterable of .* batches, .* got int"),
    "a bare pair": ((X, Y), TypeError, r"Wrap a single batch in a list, \[\(inputs, targets\)\]"),
    "a bare tensor": (X, TypeError, "got Tensor. Wrap a single batch"),
    "NaN inputs": ([(poisoned(0), Y)], ValueError, "batch 0: the inputs contain NaN or infinite values"),
    "infinite inputs": ([(X / 0, Y)], ValueError, "batch 0: the inputs contain NaN or infinite values"),
    "dead batch later": ([(X, Y), (X, Y), (poisoned(3), Y)], ValueError, "batch 2: the inputs contain NaN"),
    "batch of none": ([(X, Y), None], TypeError, r"batch 1: expected a pair .* got NoneType"),
    "batch of three": ([(X, Y, Y)], TypeError, "got tuple of 3: Tensor, Tensor, Tensor"),
    "batch without examples": ([(X, Y), (X[:0], Y[:0])], ValueError, r"batch 1: the batch has no examples .*\(0, 4\)"),
    "label too large": (
        [(X, Y), (X, Y + 1)],
        ValueError,
        r"batch 1: class labels must lie in 0 … 2 for a network with 3",
    ),
    "label negative": ([(X, Y - 1)], ValueError, "batch 0: class labels must lie in 0 … 2"),
    "float labels": (
        [(X, Y.float())],
        ValueError,
        r"batch 0: .*integer class indices of shape \(6,\).*dtype torch.float32",
    ),
    "one-hot labels": ([(X, nn.functional.one_hot(Y))], ValueError, r"got shape \(6, 3\).*targets.argmax\(1\)"),
    "too few labels": ([(X, Y[:4])], ValueError, r"shape \(6,\).* for outputs of shape \(6, 3\); got shape \(4,\)"),
    "targets come and go": ([(X, Y), X], ValueError, "batch 1: either every batch must have targets or none"),
}


@pytest.mark.parametrize("data", BAD_DATA)
def test_bad_data(data):
    batches, error, message = BAD_DATA[data]
    model = mlp32()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    posterior = kl.KronLaplace(model, "classification")
    with pytest.raises(error, match=message):
        posterior.fit(batches)
    with pytest.raises(RuntimeError, match="not fitted yet: call fit"):
        posterior.predict(X)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_failed_fit_keeps_the_last_good_one():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    before = posterior.predict(X)
    with pytest.raises(ValueError, match="batch 1"):
        posterior.fit([(X, Y), (poisoned(0), Y)])
    assert torch.equal(posterior.predict(X), before)


ONE_HOT = nn.functional.one_hot(Y)
LABELS = {
    "floats": (Y.float(), r"shape \(6,\), dtype torch.float32\. Use targets\.long\(\) if they are class indices\.$"),
    "bools": (Y > 0, r"dtype torch.bool\. Use targets\.long\(\) if they are class indices\.$"),
    "one-hot": (
        ONE_HOT,
        r"Use targets\.argmax\(1\) if yours are one-hot; class probabilities are not supported\.$",
    ),
    "one-hot floats": (ONE_HOT.float(), r"Use targets\.argmax\(1\) if yours are one-hot"),
    "a column": (Y[:, None], r"got shape \(6, 1\), dtype torch.int64\. Use targets\.squeeze\(1\)\.$"),
    "a column of floats": (Y[:, None].float(), r"Use targets\.squeeze\(1\)\.long\(\)\.$"),
    "a row": (Y[None], r"got shape \(1, 6\), dtype torch.int64\. Use targets\.squeeze\(0\)\.$"),
    "too few": (
        Y[:4],
        r"got shape \(4,\), dtype torch.int64\. Check that there is one target for each example and position\.$",
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_the_advice_fits_the_labels(name):
    """And what it says, done, is right."""
    targets, message = LABELS[name]
    with pytest.raises(ValueError, match=message) as error:
        kl.estimate_fisher(mlp32(), [(X, targets)], "classification")
    advice = re.search(r"Use (targets[.\w()]+)", str(error.value))
    if advice:
        kl.estimate_fisher(mlp32(), [(X, eval(advice[1].rstrip("."), {"targets": targets}))], "classification")


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 3)])
def test_advice_for_labels_of_tokens(shape):
    outputs = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"Use targets\.argmax\(axis\) if yours are one-hot"):
        kl.Categorical().check_targets(outputs, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"Use targets\.squeeze\(2\)\.long\(\)\."):
        kl.Categorical().check_targets(outputs, torch.zeros(2, 4, 1))


REGRESSION_TARGETS = {
    "no column": (torch.zeros(6), r"outputs, \(6, 1\); got \(6,\)\. Use targets\.unsqueeze\(1\)"),
    "other columns": (torch.zeros(6, 2), r"outputs, \(6, 1\); got \(6, 2\)\. Check the number of columns"),
    "NaN": (torch.full((6, 1), NAN), "targets contain NaN or infinite values"),
}


@pytest.mark.parametrize("name", REGRESSION_TARGETS)
def test_bad_regression_targets(name):
    targets, message = REGRESSION_TARGETS[name]
    with pytest.raises(ValueError, match=message):
        kl.estimate_fisher(nn.Linear(4, 1), [(X, targets)], "regression")


def test_bad_binary_targets():
    with pytest.raises(ValueError, match="Bernoulli targets must lie between 0 and 1"):
        kl.estimate_fisher(nn.Linear(4, 1), [(X, 2 * torch.ones(6, 1))], "binary")


def test_one_logit_is_not_categorical():
    with pytest.raises(ValueError, match=r"Categorical needs one logit per class.*returned \(6, 1\).*use Bernoulli"):
        kl.estimate_fisher(nn.Linear(4, 1), [X], "classification")


def test_parameters_that_are_not_finite():
    model = mlp32()
    with torch.no_grad():
        model[2].bias[1] = NAN
    with pytest.raises(ValueError, match=r"these parameters have NaN or infinite values: \['2.bias'\]"):
        kl.KronLaplace(model, "classification")
    with pytest.raises(ValueError, match=r"2\.bias"):
        kl.estimate_fisher(model, [X], "classification")


def test_outputs_that_are_not_finite():
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_forward_hook(lambda m, a, out: out * 1e38 * 10)
    with pytest.raises(ValueError, match="batch 0: the network's outputs are NaN or infinite on finite inputs"):
        kl.estimate_fisher(model, [X], "classification")


def test_posterior_file_of_another_architecture(tmp_path):
    path = tmp_path / "p.safetensors"
    case = mlp()
    kl.KronLaplace(case.model, "classification").fit(case.batches()).save(path)
    wider = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    with pytest.raises(
        ValueError, match=r"a different network: its block for layer '0' .* \(6, 5\) matrix, .* as \(9, 5\)"
    ):
        kl.KronLaplace.load(path, wider)
    with pytest.raises(ValueError, match="it has a layer '2', which the model does not have; the model's layers are"):
        kl.KronLaplace.load(path, nn.Sequential(nn.Linear(4, 6)).double())
    with pytest.raises(ValueError, match=r"block for layer '0' .* \(6, 5\) matrix, .* as \(3, 19\)"):
        kl.KronLaplace.load(path, cnn().model)
    with torch.no_grad():
        case.model[2].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"fitted at different weights: '2\.weight' differs"):
        kl.KronLaplace.load(path, case.model)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        kl.KronLaplace.load(path, case.model)


def test_parameters_must_be_on_one_real_device():
    with pytest.raises(ValueError, match="on one device, but it has parameters on cpu, meta"):
        kl.estimate_fisher(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta")), [X], "classification")
    with pytest.raises(ValueError, match="on one device, but it has parameters on meta"):
        kl.estimate_fisher(nn.Linear(4, 3, device="meta"), [X], "classification")
    with pytest.raises(ValueError, match="it has no parameters"):
        kl.KronLaplace(nn.Flatten(), "classification")


def test_regression_has_no_link():
    posterior = kl.KronLaplace(nn.Linear(4, 1), "regression").fit([X])
    with pytest.raises(ValueError, match=r"link='mc' would have no effect: Gaussian\(.*\) needs none"):
        posterior.predict(X, link="mc")


def with_norm():
    """Something outside the posterior that predictions depend on."""
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "2.bias"])
def test_changed_weights_are_noticed_everywhere(name, tmp_path):
    """In the posterior's own layer, in another layer, in a buffer: never a prediction from two different networks."""
    model = with_norm()
    posterior = kl.KronLaplace(model, "classification", layers=["2"]).fit([(X, Y)])
    before = posterior.predict(X)
    posterior.save(tmp_path / "p")
    tensor = model.state_dict()[name]
    tensor[0] += 1
    changed = rf"'{name}' changed after the posterior was fitted"
    for call in (lambda: posterior.predict(X), lambda: posterior.sample(1), lambda: posterior.save(tmp_path / "q")):
        with pytest.raises(RuntimeError, match=changed):
            call()
    with pytest.raises(ValueError, match=rf"fitted at different weights: '{name}' differs"):
        kl.KronLaplace.load(tmp_path / "p", model)
    with pytest.raises(ValueError, match=rf"the fisher was estimated at different weights: '{name}' differs"):
        kl.KronLaplace(model, "classification", layers=["2"]).fit(fisher=posterior.fisher)
    assert not torch.allclose(posterior.fit([(X, Y)]).predict(X), before)  # a new fit is what helps


def test_weights_that_were_changed_and_restored_are_fine():
    model = mlp32()
    posterior = kl.KronLaplace(model, "classification").fit([(X, Y)])
    before = posterior.predict(X)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.zero_()
    model.load_state_dict(state)
    assert torch.equal(posterior.predict(X), before)


def test_files_and_folders_that_are_not_there(tmp_path):
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere; create it before"):
        posterior.save(tmp_path / "nowhere" / "p")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        kl.KronLaplace.load(tmp_path, posterior.model)


def test_inputs_of_another_dtype():
    with pytest.raises(
        ValueError, match=r"inputs of dtype torch.float64; its parameters are torch.float32. Use inputs.to"
    ):
        kl.KronLaplace(mlp32(), "classification").fit([(X.double(), Y)])


def test_outputs_without_gradients():
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_forward_hook(lambda m, a, out: out.detach())
    with pytest.raises(RuntimeError, match="the model's outputs carry no gradients"):
        kl.estimate_fisher(model, [X], "classification")


def test_a_fisher_is_given_by_name():
    fisher = kl.estimate_fisher(mlp32(), [X], "classification")
    with pytest.raises(TypeError, match=r"given by name: fit\(fisher=\.\.\.\)"):
        kl.KronLaplace(mlp32(), "classification").fit(fisher)


def test_data_made_in_inference_mode():
    model = mlp32()
    with torch.inference_mode():
        x = torch.randn(6, 4)
        posterior = kl.KronLaplace(model, "classification").fit([(x, Y)])
        assert posterior.predict(x).shape == (6, 3)


def test_a_batch_with_keys_that_the_network_does_not_take():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp32()

        def forward(self, features, mask=None):
            return self.layer(features)

    with pytest.raises(TypeError, match=r"forward takes \['features', 'mask'\]; the batch has \['features', 'idx'\]"):
        kl.estimate_fisher(Named(), [{"features": X, "idx": Y, "labels": Y}], "classification")
