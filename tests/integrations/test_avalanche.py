"""`ContinualLaplace` as a plugin of Avalanche's strategies, with Avalanche itself."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kronlaplace as kl
from tests.support.avalanche import (
    BATCH,
    ContinualLaplacePlugin,
    EvaluationPlugin,
    Heads,
    IncrementalClassifier,
    N,
    ReplayPlugin,
    TaskBalancedDataLoader,
    accuracy_metrics,
    benchmark,
    digits,
    maybe_load_checkpoint,
    mlp,
    save_checkpoint,
    strategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:::avalanche.*")  # about itself, such as without loggers

CLASSES = [[0, 1], [2, 3], [4, 5]]


def memory_of(model, **options):
    return kl.ContinualLaplace(model, "classification", **{"merge": "kfoc", "prior_precision": 0.1} | options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_same_as_by_hand():
    """The same weights, to the bit, as of a loop that one writes oneself, with dropout's draws and all."""
    model = mlp()
    mine = copy.deepcopy(model)
    plugin = ContinualLaplacePlugin(memory_of(model))
    trainer = strategy(model, plugin)
    for experience in benchmark(CLASSES).train_stream:
        torch.manual_seed(1)
        trainer.train(experience, shuffle=False)

    memory = memory_of(mine)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    for experience in benchmark(CLASSES).train_stream:
        loader = TaskBalancedDataLoader(experience.dataset, batch_size=BATCH, shuffle=False)
        torch.manual_seed(1)
        mine.train()
        for _ in range(2):
            for x, y, _task in loader:
                optimizer.zero_grad()
                (F.cross_entropy(mine(x), y) + memory.penalty() / N).backward()
                optimizer.step()
        mine.eval()
        memory.consolidate([(x, y) for x, y, _task in loader])
    assert torch.equal(weights(model), weights(mine))
    assert plugin.memory.tasks == memory.tasks
    with torch.no_grad():
        for p, q in zip(model.parameters(), mine.parameters(), strict=True):
            q.copy_(p.add_(0.1))
    assert float(plugin.memory.penalty().detach()) == float(memory.penalty().detach()) > 0


def test_heads_of_a_multi_task_network():
    model = Heads()
    plugin = ContinualLaplacePlugin(memory_of(model, merge="sum"))
    trainer = strategy(model, plugin)
    stream = benchmark(CLASSES, multi_task=True)
    for experience in stream.train_stream:
        trainer.train(experience)
        trainer.eval(stream.test_stream)  # adds heads of tasks to come
    heads = [f"classifier.classifiers.{task}.classifier" for task in range(3)]
    assert [task.layers for task in plugin.memory.tasks] == [("body", head) for head in heads]
    assert float(plugin.memory.penalty().detach()) == 0

    x, y = digits(CLASSES[2])
    labels = torch.full((N,), 2)
    expected = kl.estimate_fisher(model.eval(), [((x, labels), y)], "classification", layers=["body", heads[2]])
    change = 0.1 * torch.randn_like(model.classifier.classifiers["2"].classifier.weight)
    with torch.no_grad():
        model.classifier.classifiers["2"].classifier.weight += change
    direction = F.pad(change, (0, 1))
    quadratic = (direction * (N * expected[heads[2]].matmul(direction) + 0.1 * direction)).sum()
    torch.testing.assert_close(plugin.memory.penalty().detach(), 0.5 * quadratic)


def test_a_classifier_that_grows_is_refused_before_training():
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), IncrementalClassifier(8))
    plugin = ContinualLaplacePlugin(memory_of(model))
    trainer = strategy(model, plugin)
    first, second, _ = benchmark(CLASSES).train_stream
    trainer.train(first)
    before = weights(model[0])
    with pytest.raises(ValueError, match=r"'2.classifier' holds .* as a \(2, 9\) matrix.*initial_out_features"):
        trainer.train(second)
    assert torch.equal(weights(model[0]), before)


@pytest.mark.parametrize("way_out", ["all outputs", "excluded"])
def test_the_ways_out_of_a_classifier_that_grows(way_out):
    classifier = IncrementalClassifier(8, initial_out_features=10 if way_out == "all outputs" else 2)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), classifier)
    exclude = ["2*"] if way_out == "excluded" else []
    plugin = ContinualLaplacePlugin(memory_of(model, exclude=exclude))
    trainer = strategy(model, plugin)
    for experience in benchmark(CLASSES).train_stream:
        trainer.train(experience)
    assert plugin.memory.layers == ["0", "2.classifier"][: 1 if exclude else 2]
    assert len(plugin.memory.tasks) == 3


def test_with_evaluation_and_replay_beside_it():
    model = mlp()
    plugin = ContinualLaplacePlugin(memory_of(model, strength=0.1))
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    trainer = strategy(model, ReplayPlugin(mem_size=30), plugin, evaluator=evaluator, eval_every=1)
    stream = benchmark(CLASSES)
    for experience in stream.train_stream:
        trainer.train(experience, eval_streams=[stream.test_stream])
        assert all(module.training for module in model.modules())
    assert [task.n_examples for task in plugin.memory.tasks] == [N, N, N]
    (accuracy,) = (value for name, value in trainer.eval(stream.test_stream).items() if "Top1_Acc_Stream" in name)
    assert 0.3 < accuracy <= 1


def test_a_sequence_that_is_cut_off_goes_on_from_a_checkpoint(tmp_path, capsys):
    stream = benchmark(CLASSES).train_stream
    start = mlp()

    def make():
        model = copy.deepcopy(start)
        return strategy(model, ContinualLaplacePlugin(memory_of(model)))

    whole, cut = make(), make()
    for i, experience in enumerate(stream):
        for trainer in (whole, cut):
            if i == 1 and trainer is cut:
                # Optimizers of recent versions of torch cannot be pickled by dill; SGD has no state.
                save_checkpoint(cut, tmp_path / "checkpoint.pkl", exclude=["optimizer"])
                cut, done = maybe_load_checkpoint(make(), tmp_path / "checkpoint.pkl")
                assert done == 1
                trainer = cut
                assert trainer.plugins[0].memory.model is trainer.model
            torch.manual_seed(i)
            trainer.train(experience)
    assert torch.equal(weights(whole.model), weights(cut.model))
    assert whole.plugins[0].memory.tasks == cut.plugins[0].memory.tasks
    capsys.readouterr()  # Avalanche prints how it maps devices


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "continual_learning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python needs-avalanche\n(.*?)```", page, flags=re.DOTALL)
    names = {"model": mlp(), "benchmark": benchmark(CLASSES)}
    exec(compile(block.replace("Naive(", "Naive(evaluator=None, "), "the page", "exec"), names)
    assert len(names["memory"].tasks) == 3
