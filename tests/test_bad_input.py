"""Bad input gets one clear error, before or in the middle of a fit, and nothing half-changed stays behind."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from tests.networks import cnn, mlp

NAN = float("nan")


def mlp32():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def poisoned(index):
    x = X.clone()
    x[index] = NAN
    return x


def iterator():
    yield from ()


BAD_DATA = {
    "empty list": ([], ValueError, "the data is empty: no batch came out of the loader"),
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
    "batch without examples": ([(X, Y), (X[:0], Y[:0])], ValueError, r"batch 1: has no examples .*\(0, 4\)"),
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
    "targets come and go": ([(X, Y), X], ValueError, "batch 1: targets must come with every batch or with none"),
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
        r"Use targets\.argmax\(1\) if yours are one-hot; probabilities of the classes are not supported\.$",
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


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.gate * x


class MyLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


UNSUPPORTED = {
    "a module of the user's": (Gate(), r"1 \(Gate\): this layer type is not supported; its parameters: gate"),
    "a transposed convolution": (
        nn.Sequential(nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 4, 1), nn.Flatten()),
        r"1\.1 \(ConvTranspose1d\): this layer type is not supported; its parameters: bias, weight",
    ),
    "an overridden forward": (MyLinear(4, 4), r"1 \(MyLinear\): it overrides Linear.forward"),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "1.parametrizations.weight"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers_are_named_with_the_ways_out(name):
    module, message = UNSUPPORTED[name]
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 3)).eval()
    with pytest.raises(NotImplementedError, match=message) as error:
        kl.KronLaplace(model, "classification")
    assert "leave the module out with layers=[...]" in str(error.value)
    assert "freeze it" in str(error.value)
    assert 'unsupported="fixed"' in str(error.value)
    fixed = kl.KronLaplace(model, "classification", unsupported="fixed").fit([(X, Y)])
    assert list(fixed.fisher) == ["0", "2"]
    assert fixed.predict(X).shape == (6, 3)
    kl.KronLaplace(model, "classification", layers=["0", "2"]).fit([(X, Y)]).predict(X)
    module.requires_grad_(False)
    kl.KronLaplace(model, "classification").fit([(X, Y)]).predict(X)


def test_modules_that_share_only_some_parameters_are_refused():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(NotImplementedError, match=r"\['0', '1'\] share some of their parameters but not all"):
        kl.KronLaplace(tied, "classification")
    kl.KronLaplace(tied, "classification", layers=["2"]).fit([(X, Y)]).predict(X)


def test_nothing_supported_is_left():
    with pytest.raises(NotImplementedError, match=r"\(the model itself\) \(Gate\)"):
        kl.KronLaplace(Gate(), "classification", unsupported="fixed")


def test_bias_alone_is_refused():
    model = mlp32()
    model[0].weight.requires_grad_(False)
    with pytest.raises(NotImplementedError, match=r"must be the weight, with or without the bias; they are \['bias'\]"):
        kl.KronLaplace(model, "classification")


def test_nothing_trainable():
    with pytest.raises(ValueError, match="no trainable parameters"):
        kl.KronLaplace(mlp32().requires_grad_(False), "classification")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["4"], r"no module '4'; with trainable parameters are \['0', '2'\]"),
        (["1"], r"module '1' \(ReLU\) has no trainable parameters"),
        (["0", "0"], "a name stands there twice"),
        ("4", r"no module '4'; with trainable parameters are \['0', '2'\]"),
        ("[1]*", r"no module with trainable parameters of its own matches '\[1\]\*'; there are \['0', '2'\]"),
        ([], r"layers is empty; name at least one of \['0', '2'\]"),
    ],
)
def test_bad_layer_names(layers, message):
    with pytest.raises(ValueError, match=message):
        kl.KronLaplace(mlp32(), "classification", layers=layers)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval()])
def test_batch_norm_with_batch_statistics_is_refused(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"module '1' \(BatchNorm1d\) normalises with the statistics of the batch.*eval\(\)"
    ):
        kl.estimate_fisher(model, [X], "classification", layers=["0"])


def test_dropout_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"module '1' \(Dropout\) is in training mode.*Call model.eval\(\) first"):
        kl.KronLaplace(model, "classification")
    kl.KronLaplace(model.eval(), "classification").fit([(X, Y)])


class Wrapped(nn.Module):
    """A network whose forward pass is given."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 4), nn.Linear(4, 3), run

    def forward(self, x):
        return self.run(self, x)


def under_no_grad(self, x):
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


STRANGE_FORWARDS = {
    "never called": (lambda s, x: s.b(x), RuntimeError, r"not called as modules in the forward pass: \['a'\]"),
    "as a function": (
        lambda s, x: s.b(nn.functional.linear(x, s.a.weight)),
        RuntimeError,
        r"not called as modules in the forward pass: \['a'\]",
    ),
    "cut off": (
        lambda s, x: s.b(x) + 0 * s.a(x).detach().sum(),
        RuntimeError,
        r"do not depend on these layers: \['a'\]",
    ),
    "no grad": (under_no_grad, RuntimeError, r"layer 'a' ran without gradients \(inside torch.no_grad\(\)\?\)"),
    "examples reshaped": (
        lambda s, x: s.b(s.a(x.repeat(2, 1)))[: len(x)],
        NotImplementedError,
        r"layer 'a' \(Linear\) got an input of shape \(12, 4\) in a batch of 6 examples; it must be \(examples, \.\.\., 4\)",
    ),
    "a tuple": (lambda s, x: (s.b(s.a(x)),), TypeError, r"must return a tensor of outputs .*, it returned tuple"),
    "examples lost": (lambda s, x: s.b(s.a(x)).mean(0), ValueError, r"for 6 examples it returned .* shape \(3,\)"),
}


@pytest.mark.parametrize("name", STRANGE_FORWARDS)
def test_what_a_forward_pass_may_not_do(name):
    run, error, message = STRANGE_FORWARDS[name]
    with pytest.raises(error, match=message):
        kl.estimate_fisher(Wrapped(run), [(X, Y)], "classification")


OPTIONS = {
    "estimator": ({"estimator": "kfax"}, ValueError, "unknown estimator 'kfax'; the shorthands are 'kfac', 'kfc'"),
    "estimator class": ({"estimator": kl.KFAC}, TypeError, r"estimator must be an instance such as KFAC\(\)"),
    "likelihood": ({"likelihood": "softmax"}, ValueError, "unknown likelihood 'softmax'"),
    "sampling": ({"sampling": "all"}, ValueError, "unknown sampling 'all'; allowed are 'exact', 'mc', 'empirical'"),
    "no samples": ({"mc_samples": 0}, ValueError, "mc_samples must be at least 1, got 0"),
    "samples of what is exact": (
        {"sampling": "exact", "mc_samples": 5},
        ValueError,
        "mc_samples=5 only applies when sampling=\"mc\" \\(got sampling='exact'\\)",
    ),
    "no seed": ({"seed": None}, TypeError, "seed must be an integer, got None"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be from 0"),
    "half a sample": ({"mc_samples": 0.5}, TypeError, "mc_samples must be an integer, got 0.5"),
    "not a model": ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_of_the_fisher(name):
    options, error, message = OPTIONS[name]
    call = {"model": mlp32(), "data": [(X, Y)], "likelihood": "classification"} | options
    with pytest.raises(error, match=message):
        kl.estimate_fisher(**call)


POSTERIOR_OPTIONS = {
    "negative prior": ({"prior_precision": -1.0}, "prior_precision must be positive and finite, got -1.0"),
    "NaN prior": ({"prior_precision": [1.0, NAN]}, "prior_precision must be positive and finite"),
    "wrong number": (
        {"prior_precision": [1.0, 1.0, 1.0]},
        r"one number, 2 \(one per block\) or 43 \(one per weight\), got shape \(3,\)",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
}


@pytest.mark.parametrize("name", POSTERIOR_OPTIONS)
def test_bad_options_of_the_posterior(name):
    options, message = POSTERIOR_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        kl.KronLaplace(mlp32(), "classification", **options)


CALLS = {
    "method": (lambda p: p.predict(X, method="map"), "unknown method 'map'; allowed are 'glm', 'sample'"),
    "link": (
        lambda p: p.predict(X, link="logit"),
        r"unknown link 'logit'; allowed are 'probit', 'centered-probit', 'mc', 'bridge'",
    ),
    "link of samples": (
        lambda p: p.predict(X, method="sample", link="mc"),
        "link='mc' would have no effect: method=\"sample\" needs none",
    ),
    "samples of a closed form": (lambda p: p.predict(X, n_samples=5), "n_samples=5 would have no effect"),
    "no samples": (lambda p: p.predict(X, link="mc", n_samples=0), "n_samples must be at least 1, got 0"),
    "no inputs": (lambda p: p.predict(X[:0]), r"at least one example on its first axis, .*; got shape \(0, 4\)"),
    "not a tensor": (lambda p: p.predict(X.numpy()), "at least one example on its first axis, .*; got ndarray"),
    "NaN inputs": (lambda p: p.predict(poisoned(0)), "the inputs contain NaN or infinite values"),
    "sample none": (lambda p: p.sample(0), "n must be at least 1, got 0"),
    "tune method": (lambda p: p.tune(method="magic"), "unknown method 'magic'; allowed are 'evidence', 'validation'"),
    "tune structure": (lambda p: p.tune(structure="full"), "unknown structure 'full'; allowed are"),
    "noise": (lambda p: p.log_marginal_likelihood(noise_std=1.0), "noise_std belongs to the Gaussian likelihood"),
    "prior": (lambda p: p.log_marginal_likelihood(prior_precision=0.0), "prior_precision must be positive"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_of_a_fitted_posterior(name):
    call, message = CALLS[name]
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    with pytest.raises(ValueError, match=message):
        call(posterior)


def test_bridge_needs_classes():
    posterior = kl.KronLaplace(nn.Linear(4, 1), "binary").fit([X])
    with pytest.raises(ValueError, match=r"link 'bridge' is not for Bernoulli\(\); allowed are \['probit', 'mc'\]"):
        posterior.predict(X, link="bridge")


def test_evidence_needs_targets():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([X])
    with pytest.raises(ValueError, match="the evidence needs targets"):
        posterior.tune()


def test_fit_takes_data_or_a_fisher():
    posterior = kl.KronLaplace(mlp32(), "classification")
    with pytest.raises(TypeError, match="either data or fisher=, exactly one"):
        posterior.fit()
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    fisher = kl.estimate_fisher(other, [X], "classification")
    with pytest.raises(ValueError, match=r"the fisher is of another network: layer '0' has .* \(7, 5\) matrix there"):
        posterior.fit(fisher=fisher)
    with pytest.raises(
        ValueError, match=r"the fisher has no blocks for the layers \['0'\] of the posterior, only for \['2'\]"
    ):
        posterior.fit(fisher=kl.estimate_fisher(posterior.model, [X], "classification", layers=["2"]))
    fisher = kl.estimate_fisher(posterior.model, [X], "regression")
    with pytest.raises(ValueError, match=r"estimated with Gaussian.*the posterior has Categorical"):
        posterior.fit(fisher=fisher)


def test_posterior_file_of_another_architecture(tmp_path):
    path = tmp_path / "p.safetensors"
    case = mlp()
    kl.KronLaplace(case.model, "classification").fit(case.batches()).save(path)
    wider = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    with pytest.raises(
        ValueError, match=r"another network: layer '0' has .* \(6, 5\) matrix there.*\(9, 5\) in the model"
    ):
        kl.KronLaplace.load(path, wider)
    with pytest.raises(ValueError, match="it has a layer '2', the model has not; the model's layers are"):
        kl.KronLaplace.load(path, nn.Sequential(nn.Linear(4, 6)).double())
    with pytest.raises(ValueError, match=r"layer '0' has .* \(6, 5\) matrix there, .* \(3, 19\) in the model"):
        kl.KronLaplace.load(path, cnn().model)
    with torch.no_grad():
        case.model[2].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"fitted at other weights: '2\.weight' differs"):
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
    with pytest.raises(ValueError, match=r"link='mc' would have no effect: Gaussian\(noise_std=1.0\) needs none"):
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
    with pytest.raises(ValueError, match=rf"fitted at other weights: '{name}' differs"):
        kl.KronLaplace.load(tmp_path / "p", model)
    with pytest.raises(ValueError, match=rf"the fisher was estimated at other weights: '{name}' differs"):
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
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere; make it first"):
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


CALLS_BY_TYPE = {
    "grid": (
        lambda p: p.tune("validation", data=[(X, Y)], grid=5.0),
        r"grid must be a list of prior precisions.*got 5.0",
    ),
    "predictive": (
        lambda p: p.tune("validation", data=[(X, Y)], predictive="mc"),
        r"predictive must be a kl.Predictive, .*got 'mc'",
    ),
    "inverting a Fisher": (lambda p: kl.damping.Tikhonov(1.0).invert(p.fisher), r"invert takes one block.*invert_all"),
    "inverting all of a block": (
        lambda p: kl.damping.Tikhonov(1.0).invert_all(p.fisher["0"]),
        r"invert_all takes a Fisher or a dict of blocks; got KroneckerBlock",
    ),
}


@pytest.mark.parametrize("name", CALLS_BY_TYPE)
def test_arguments_of_another_type(name):
    call, message = CALLS_BY_TYPE[name]
    with pytest.raises(TypeError, match=message):
        call(kl.KronLaplace(mlp32(), "classification").fit([(X, Y)]))


def test_a_gradient_without_the_bias():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    q, p = posterior.fisher["0"].shape
    with pytest.raises(ValueError, match=rf"must have shape \(..., {q}, {p}\).* bias as the last column"):
        posterior.covariance()["0"].solve(torch.zeros(q, p - 1))


def test_noise_of_a_classifier():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    with pytest.raises(ValueError, match="noise_std belongs to the Gaussian likelihood"):
        posterior.set_hyperparameters(1.0, noise_std=1.0)


@pytest.mark.parametrize("call", ["tune", "log_marginal_likelihood", "covariance", "predict"])
def test_changed_weights_are_an_error_everywhere(call):
    model = mlp32()
    posterior = kl.KronLaplace(model, "classification").fit([(X, Y)])
    posterior.covariance()
    with torch.no_grad():
        model[0].weight.add_(0.1)
    arguments = (X,) if call == "predict" else ()
    with pytest.raises(RuntimeError, match="changed after the posterior was fitted"):
        getattr(posterior, call)(*arguments)


def test_a_batch_with_keys_that_the_network_does_not_take():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp32()

        def forward(self, features, mask=None):
            return self.layer(features)

    with pytest.raises(TypeError, match=r"forward takes \['features', 'mask'\]; the batch has \['features', 'idx'\]"):
        kl.estimate_fisher(Named(), [{"features": X, "idx": Y, "labels": Y}], "classification")
