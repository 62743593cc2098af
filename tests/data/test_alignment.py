"""Labels of language models: the sums are those of the model's own loss, or the batch is refused."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl

CLASSES = 7
GENERATOR = torch.Generator().manual_seed(3)
TOKENS = torch.randint(CLASSES, (5, 6), generator=GENERATOR)
LABELS = TOKENS.clone()
LABELS[0, :2], LABELS[3, 4:] = -100, -100
MASK = torch.ones_like(TOKENS)
MASK[0, :2] = 0
BATCH = {"input_ids": TOKENS, "attention_mask": MASK, "labels": LABELS}
IGNORED = -100


class Output(dict):
    """As Hugging Face's: a mapping whose entries are attributes, too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class LanguageModel(nn.Module):
    """As in transformers: logits without labels, logits and loss with them."""

    def __init__(self, shifts=True, reduction="mean", masked=False):
        super().__init__()
        self.token, self.mix, self.head = nn.Embedding(CLASSES, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.shifts, self.reduction, self.masked = shifts, reduction, masked
        self.double()

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.token(input_ids)
        logits = self.head(torch.tanh(self.mix(h.cumsum(1))))
        if labels is None:
            return Output(logits=logits)
        if self.masked:
            labels = labels.masked_fill(attention_mask == 0, IGNORED)
        if self.shifts:
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=self.reduction)
        return Output(loss=loss, logits=logits)


def per_token(fisher):
    nll, count = fisher.statistics.tolist()
    return nll / count


def own_loss(model, batch):
    return float(model.eval()(**batch).loss.detach())


def estimate(model, data, likelihood="classification", **options):
    return kl.estimate_fisher(model.eval(), data, likelihood, sampling="exact", **options)


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("labels", ["tokens", "classes"])
def test_the_loss_is_the_models_own(shifts, labels):
    """Shifted where the model shifts, whether the labels are the tokens or something else, and only there."""
    model = LanguageModel(shifts)
    batch = BATCH if labels == "tokens" else {**BATCH, "labels": torch.where(LABELS < 0, LABELS, 6 - LABELS)}
    fisher = estimate(model, [batch])
    assert per_token(fisher) == pytest.approx(own_loss(model, batch), rel=1e-12)
    assert fisher.statistics[1] == (LABELS[:, shifts:] != IGNORED).sum()


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"masked": True}], ids=str)
@pytest.mark.parametrize("shifts", [True, False])
def test_other_losses_are_understood(options, shifts):
    """A sum over no label is zero, not NaN; a loss that skips padding is no loss that shifts."""
    model = LanguageModel(shifts, **options)
    targets = F.pad(LABELS[:, 1:], (0, 1), value=IGNORED) if shifts else LABELS
    expected = F.cross_entropy(model(TOKENS).logits.flatten(0, 1), targets.flatten())
    assert per_token(estimate(model, [BATCH])) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_the_fisher_is_that_of_pairs_with_the_next_tokens():
    """Of all blocks, with labels drawn, in several passes, and in batches."""
    model = LanguageModel()
    targets = F.pad(LABELS[:, 1:], (0, 1), value=IGNORED)
    inputs = {"input_ids": TOKENS, "attention_mask": MASK}

    def parts(*tensors):
        return zip(*(t.split(2) for t in tensors), strict=True)

    mappings = [{"input_ids": t, "attention_mask": m, "labels": y} for t, m, y in parts(TOKENS, MASK, LABELS)]
    pairs = [({"input_ids": t, "attention_mask": m}, y) for t, m, y in parts(TOKENS, MASK, targets)]
    for estimator, options in (("kfac", {}), ("ekfac", {"seed": 4})):
        ours = kl.estimate_fisher(model, mappings, "classification", estimator, **options)
        expected = kl.estimate_fisher(model, pairs, "classification", estimator, **options)
        torch.testing.assert_close(ours.to_dense(), expected.to_dense(), rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.statistics, expected.statistics)
    assert kl.relative_error(ours, model, mappings) == kl.relative_error(ours, model, pairs)
    tuned = [
        kl.KronLaplace(model, "classification").fit(data).tune("validation", data=data, grid=[0.1, 1.0, 10.0, 100.0])
        for data in (mappings, pairs)
    ]
    assert torch.equal(tuned[0].prior_precision, tuned[1].prior_precision)
    torch.testing.assert_close(tuned[0].predict(mappings), tuned[0].predict(inputs))


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_validation_data_are_shifted_too():
    """The negative log-likelihood is that of next tokens: with a flat posterior the model's own loss."""
    model = LanguageModel().eval()
    posterior = kl.KronLaplace(model, "classification").fit([BATCH])
    losses = []
    original = kl.Categorical.predictive_nll

    def predictive_nll(self, prediction, targets):
        losses.append(original(self, prediction, targets))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kl.Categorical, "predictive_nll", predictive_nll)
        posterior.tune("validation", data=[BATCH], grid=[1e10])
    assert float(losses[0][0] / losses[0][1]) == pytest.approx(own_loss(model, BATCH), rel=1e-4)


@pytest.mark.grid
def test_training_is_on_next_tokens():
    model = LanguageModel()
    trained = kl.train_by_evidence(model, [BATCH], "classification", epochs=2, every=1)
    assert trained.best.log_likelihood == pytest.approx(
        -own_loss(model, BATCH) * int((LABELS[:, 1:] != IGNORED).sum()), rel=1e-9
    )


def test_another_ignore_index():
    """The last position gets the likelihood's own mark, and padding keeps it."""
    model = LanguageModel()
    padding = CLASSES + 5
    batch = {**BATCH, "labels": torch.where(LABELS < 0, padding, LABELS)}
    fisher = estimate(model, [batch], kl.Categorical(ignore_index=padding))
    assert per_token(fisher) == pytest.approx(own_loss(model, BATCH), rel=1e-12)


def test_labels_are_never_shifted_twice():
    model = LanguageModel()
    shifted = F.pad(LABELS[:, 1:], (0, 1), value=IGNORED)
    for data in ([{**BATCH, "labels": shifted}], [({"input_ids": TOKENS}, shifted)], [(TOKENS, shifted)]):
        assert per_token(estimate(model, data)) == pytest.approx(own_loss(model, BATCH), rel=1e-12)


@pytest.mark.parametrize("inputs", [TOKENS, {"input_ids": TOKENS}], ids=["tensor", "mapping"])
def test_pairs_with_the_tokens_themselves_are_refused(inputs):
    with pytest.raises(
        ValueError, match=r"batch 0: the targets are the input tokens themselves, but the model predicts"
    ):
        estimate(LanguageModel(), [(inputs, LABELS)])
    estimate(LanguageModel(shifts=False), [(inputs, LABELS)])


class LogitsOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = LanguageModel()

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, attention_mask).logits


class LosesTheLoss(LogitsOnly):
    def forward(self, input_ids, **options):
        return self.inner(input_ids, **options).logits


@pytest.mark.parametrize("wrapper", [LogitsOnly, LosesTheLoss])
def test_models_that_cannot_be_asked(wrapper):
    """The tokens as labels are refused, with a way out that works; anything else is taken as it is."""
    model = wrapper()
    with pytest.raises(ValueError, match="whether this model does cannot be determined") as error:
        estimate(model, [BATCH])
    way_out = str(error.value).partition("for the next token: ")[2].rstrip(".")
    data = list(eval(way_out, {"F": F, "loader": [BATCH]}))
    assert per_token(estimate(model, data)) == pytest.approx(own_loss(model.inner, BATCH), rel=1e-12)
    other = {**BATCH, "labels": (TOKENS + 1) % CLASSES}
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), other["labels"].flatten())
    assert per_token(estimate(model, [other])) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_asking_leaves_the_model_alone():
    """Modes, random state and statistics: dropout and batch norm in training mode are only there while training."""

    class Noisy(LanguageModel):
        def __init__(self):
            super().__init__()
            self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, input_ids, attention_mask=None, labels=None):
            modes.append((self.training, self.drop.training, self.frozen.training))
            return super().forward(input_ids, attention_mask, labels)

    from kronlaplace.network.alignment import Alignment

    modes = []
    model = Noisy().train()
    model.frozen.eval()
    aligned = Alignment(model, kl.Categorical())
    targets = aligned({"input_ids": TOKENS}, LABELS, in_pair=False, batch=0)
    assert modes == [(False, False, False)]
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    assert torch.equal(targets, F.pad(LABELS[:, 1:], (0, 1), value=IGNORED))
    assert aligned({"input_ids": TOKENS}, LABELS, in_pair=False, batch=1).equal(targets)
    assert len(modes) == 1  # asked once


def test_one_token():
    """Nothing is predicted by it."""
    batch = {"input_ids": TOKENS[:, :1], "labels": TOKENS[:, :1]}
    assert estimate(LanguageModel(), [batch]).statistics.tolist() == [0, 0]


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
REAL = {
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
    "Llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 16}),
    "XLNet": ("XLNetLMHeadModel", {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}),
    "Bert": ("BertForMaskedLM", {**SMALL, "max_position_embeddings": 16}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REAL)
def test_models_of_transformers(family):
    """Two decoders that shift, one that does not, and a masked language model."""
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    name, settings = REAL[family]
    config = getattr(importlib.import_module("transformers"), f"{family}Config")(**settings)
    model = getattr(transformers, name)(config).eval()
    fisher = kl.estimate_fisher(model, [BATCH], "classification", unsupported="fixed")
    assert per_token(fisher) == pytest.approx(float(model(**BATCH).loss.detach()), rel=1e-5)
    assert math.isfinite(float(fisher.trace()))
