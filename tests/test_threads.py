"""One posterior in many threads, and interrupts at any moment: every answer is right, and the network is as it was."""

import ctypes
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.networks import Attentive, cnn, mlp, residual
from tests.support.unchanged import assert_unchanged, everything


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def recurrent():
    return Recurrent().double().eval(), torch.randn(5, 6, 3).double()


def attentive():
    return Attentive().double().eval(), torch.randn(5, 6, 4).double()


def of_case(make):
    return lambda: (lambda case: (case.model, case.inputs))(make())


NETWORKS = {
    "mlp": of_case(mlp),
    "cnn": of_case(cnn),
    "residual": of_case(residual),
    "recurrent": recurrent,
    "attentive": attentive,
}


@pytest.fixture(params=NETWORKS)
def problem(request):
    """A fitted posterior, inputs, and what it is asked for, with the right answers."""
    model, x = NETWORKS[request.param]()
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.arange(len(x)) % 3)])
    questions = [
        lambda p, x: p.functional_variance(x),
        lambda p, x: p.functional_variance(x, diagonal=True),
        lambda p, x: p.functional_variance(x, joint=True),
        lambda p, x: p.predict(x),
        lambda p, x: p.predict(x, method="sample", n_samples=2, antithetic=True),
        lambda p, x: p.predict(x.clone().requires_grad_(), differentiable=True).detach(),
        lambda p, x: torch.cat([draw.flatten() for draw in p.sample(2).values()]),
    ]
    return posterior, x, questions, [ask(posterior, x) for ask in questions]


def together(*tasks):
    """Run tasks at the same time, and raise what they raise."""
    start = threading.Barrier(len(tasks))

    def started(task):
        start.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(started, task) for task in tasks]]


@pytest.mark.quick(1)
def test_answers_of_one_posterior_in_four_threads(problem):
    posterior, x, questions, right = problem
    before = everything(posterior.model)

    def client(k):
        for i in range(2 * len(questions)):
            which = (i + k) % len(questions)
            torch.testing.assert_close(questions[which](posterior, x), right[which], rtol=1e-9, atol=1e-12)

    together(*(lambda k=k: client(k) for k in range(4)))
    assert_unchanged(posterior.model, before)


@pytest.mark.quick(1)
def test_another_thread_uses_and_trains_the_network_meanwhile(problem):
    """What it gets is what it gets alone, gradients included, and it never meets a hook or a frozen parameter."""
    posterior, x, questions, right = problem
    model = posterior.model
    done = threading.Event()
    outputs = model(x).detach()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(x).square().sum(), parameters)
    calls = 0

    def other():
        nonlocal calls
        while not done.is_set() or calls == 0:
            f = model(x)
            assert f.requires_grad
            torch.testing.assert_close(f.detach(), outputs, rtol=1e-9, atol=1e-12)  # attention may take another kernel
            for found, expected in zip(torch.autograd.grad(f.square().sum(), parameters), gradients, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            calls += 1

    def ours():
        try:
            for _ in range(3):
                for ask, answer in zip(questions, right, strict=True):
                    torch.testing.assert_close(ask(posterior, x), answer, rtol=1e-9, atol=1e-12)
                kl.estimate_fisher(model, [x], "classification", sampling="exact")
        finally:
            done.set()

    together(ours, other)


@pytest.mark.quick(3)
def test_fits_of_one_network_at_the_same_time(problem):
    posterior, x, _, _ = problem

    def fit():
        return kl.estimate_fisher(posterior.model, [x], "classification", sampling="exact")

    for fisher in together(fit, fit, fit):
        for name, block in fisher.items():
            torch.testing.assert_close(block.to_dense(), posterior.fisher[name].to_dense(), rtol=1e-9, atol=1e-15)


def test_an_answer_belongs_to_one_state():
    """While another thread sets prior and noise together, no prediction has the one of before and the other of after."""
    case = mlp("regression")
    posterior = kl.KronLaplace(case.model, "regression").fit(case.batches())
    settings = [kl.Hyperparameters(kl.IsotropicPrior(1.0), 0.1), kl.Hyperparameters(kl.IsotropicPrior(100.0), 2.0)]
    allowed = []
    for both in settings:
        posterior.hyperparameters = both
        allowed.append(posterior.predict(case.inputs))
    done = threading.Event()

    def change():
        for i in range(300):
            posterior.hyperparameters = settings[i % 2]
        done.set()

    def predict():
        while not done.is_set():
            found = posterior.predict(case.inputs)
            assert any(
                torch.allclose(found.variance, a.variance, rtol=1e-9) and found.noise_variance.equal(a.noise_variance)
                for a in allowed
            )

    together(change, predict, predict)


def test_a_posterior_is_as_before_while_it_is_tuned_on_validation_data():
    """Other threads see the hyperparameters change once, when the best are known."""
    case = mlp()
    posterior = kl.KronLaplace(case.model, "classification", prior_precision=3.0).fit(case.batches())

    class Watching(list):
        def __iter__(self):
            assert posterior.prior_precision == 3.0
            return super().__iter__()

    posterior.tune("validation", data=Watching(case.batches()), grid=[10.0])
    assert posterior.prior_precision == 10.0


@pytest.mark.grid
def test_a_refit_while_others_predict():
    case = cnn()
    posterior = kl.KronLaplace(case.model, "classification", sampled := kl.KFAC())
    halves = [case.batches()[:1], case.batches()[1:]]
    allowed = [posterior.fit(half).functional_variance(case.inputs) for half in halves]
    done = threading.Event()

    def refit():
        for i in range(20):
            posterior.fit(halves[i % 2])
        done.set()

    def predict():
        while not done.is_set():
            found = posterior.functional_variance(case.inputs)
            assert any(torch.allclose(found, right, rtol=1e-9, atol=1e-15) for right in allowed)

    together(refit, predict)
    assert posterior.estimator is sampled


def test_a_prior_that_is_set_during_a_fit_stays():
    case = mlp()
    posterior = kl.KronLaplace(case.model, "classification")

    class Setting(list):
        def __iter__(self):
            posterior.prior_precision = 7.0
            return super().__iter__()

    assert posterior.fit(Setting(case.batches())).prior_precision == 7.0


def test_saves_to_one_path_at_the_same_time(tmp_path):
    case = mlp()
    path = tmp_path / "posterior.safetensors"
    posteriors = [kl.KronLaplace(case.model, "classification", prior_precision=d).fit(case.batches()) for d in (1, 2)]

    def save(posterior):
        for _ in range(10):
            posterior.save(path)
            assert kl.KronLaplace.load(path, case.model).prior_precision in (1, 2)

    together(*(lambda p=p: save(p) for p in posteriors))
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.safetensors"]


class Interrupt(BaseException):
    """Comes like a Ctrl-C, at any moment."""


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("network", ["recurrent", "residual"])
def test_interrupts_leave_no_trace(network):
    """A pass that is interrupted anywhere leaves the network as it was, and the posterior with its answers."""
    model, x = NETWORKS[network]()
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.arange(len(x)) % 3)])
    right = posterior.functional_variance(x)
    before = everything(model)
    draw = random.Random(0)
    interrupted = 0
    began = time.perf_counter()
    posterior.fit([x])
    posterior.functional_variance(x)
    duration = time.perf_counter() - began

    def work():
        nonlocal interrupted
        try:
            while True:
                posterior.fit([x])
                posterior.functional_variance(x)
        except Interrupt:
            interrupted += 1

    for _ in range(15):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(draw.uniform(0, 1.5 * duration))
        while thread.is_alive():  # one that comes in a destructor is ignored by Python
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt))
            thread.join(5 * duration)
        assert_unchanged(model, before)
        torch.testing.assert_close(posterior.functional_variance(x), right, rtol=1e-9, atol=1e-15)
    assert interrupted > 10


@pytest.mark.slow
def test_a_server_with_a_thread_pool():
    """240 requests by four threads, of one posterior: as the issue that this comes from had it."""
    model, x = NETWORKS["cnn"]()
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.arange(len(x)) % 3)])
    requests = [x[:1], x[1:3], x]
    right = [posterior.functional_variance(r) for r in requests]
    done = threading.Event()
    others = []

    def other():
        while not done.is_set():
            others.append(torch.equal(model(x), expected))

    expected = model(x)
    thread = threading.Thread(target=other)
    thread.start()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: posterior.functional_variance(requests[i % 3]), range(4 * 240)))
    done.set()
    thread.join()
    exact = sum(torch.allclose(a, right[i % 3], rtol=1e-9, atol=1e-15) for i, a in enumerate(answers))
    print(f"{exact} of {len(answers)} right; the other thread: {sum(others)} of {len(others)}")
    assert exact == len(answers)
    assert others and all(others)
