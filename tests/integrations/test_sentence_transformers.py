"""sentence-transformers' ranking losses: beside the real package, and in its trainer."""

import importlib
import inspect
import itertools
import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from torch import nn

from sclkern.errors import UserError

NAMES = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *chosen) for size in range(4) for chosen in itertools.combinations(OTHERS, size)]
MODES = [(directions, "joint") for directions in JOINT]
MODES += [(directions, "per_direction") for directions in JOINT if not {"query_to_query", "doc_to_doc"} & {*directions}]
ROWS, WIDTH = 12, 8


@pytest.fixture(scope="module")
def ours():
    return importlib.import_module("sclkern.integrations.sentence_transformers")


@pytest.fixture(scope="module")
def theirs():
    return importlib.import_module("sentence_transformers.sentence_transformer.losses")


@pytest.fixture(scope="module")
def util():
    return importlib.import_module("sentence_transformers.util")


class Encoder(nn.Module):
    """What the losses need of a model, with random numbers and inputs of its own: rows of features."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH, bias=False), nn.Dropout(dropout)

    def __getitem__(self, _):
        return self.linear

    def get_embedding_dimension(self):
        return WIDTH

    def forward(self, features):
        return {"sentence_embedding": self.linear(self.dropout(features["rows"]))}


def columns(negatives, rows=ROWS, scale=0.5):
    """Anchors, positives that are close, and columns of negatives, not of unit length."""
    generator = torch.Generator().manual_seed(0)
    anchors, *others = (scale * torch.randn(rows, WIDTH, generator=generator).double() for _ in range(2 + negatives))
    return [{"rows": rows} for rows in (anchors, 0.7 * anchors + 0.7 * others[0], *others[1:])]


def trained(module, name, inputs, dropout=0.0, dtype=torch.float64, **options):
    """The loss, and the gradient of the encoder."""
    model = Encoder(dropout).to(dtype)
    inputs = [{"rows": column["rows"].to(dtype)} for column in inputs]
    torch.manual_seed(1)
    if name.startswith("Cached"):
        options["mini_batch_size"] = 5
    value = getattr(module, name)(model, **options)(inputs, torch.empty(0))
    value.backward()
    return value.detach(), model.linear.weight.grad


def assert_same(one, other):
    """In float32, up to rounding errors of the largest number of each tensor."""
    for ours, theirs in zip(one, other, strict=True):
        tolerance = 1e-10 if theirs.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_package(name, ours, theirs):
    """A new one is not ignored: it is refused, and this test tells."""

    def arguments(module):
        signature = inspect.signature(getattr(module, name).__init__)
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert arguments(ours) == arguments(theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(("directions", "mode"), MODES, ids=["+".join([m, *d[1:]]) for d, m in MODES])
def test_values_and_gradients(name, negatives, directions, mode, ours, theirs):
    options = {"directions": directions, "partition_mode": mode, "scale": 7.0}
    assert_same(*(trained(module, name, columns(negatives), **options) for module in (ours, theirs)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score"])
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarities_and_scales(name, similarity, scale, dtype, ours, theirs, util):
    options = {"similarity_fct": getattr(util, similarity), "scale": scale, "dtype": dtype}
    assert_same(*(trained(module, name, columns(2), **options) for module in (ours, theirs)))


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(("directions", "mode"), [MODES[0], MODES[2], MODES[7], MODES[-1]])
def test_penalised_hard_negatives(negatives, directions, mode, ours, theirs):
    options = {"directions": directions, "partition_mode": mode, "scale": 7.0}
    options |= {"hardness_mode": "hard_negatives", "hardness_strength": 3.0}
    for name in NAMES:
        assert_same(*(trained(module, name, columns(negatives), **options) for module in (ours, theirs)))


@pytest.mark.parametrize(("directions", "mode"), MODES)
def test_one_row(directions, mode, ours, theirs):
    options = {"directions": directions, "partition_mode": mode}
    for negatives in (0, 2):
        inputs = columns(negatives, rows=1)
        assert_same(*(trained(module, NAMES[0], inputs, **options) for module in (ours, theirs)))


@pytest.mark.parametrize("directions", [JOINT[0], JOINT[1]])
def test_confident_rows_keep_their_gradient(directions, ours, theirs, util):
    """Where a logsumexp less the score of the positive is rounded to 0, a float32 softmax has no gradient."""

    def gradient(module, dtype):
        embeddings = [(5 * torch.eye(WIDTH, dtype=dtype)).requires_grad_() for _ in range(2)]
        options = {"similarity_fct": util.dot_score, "scale": 1.0, "directions": directions}
        getattr(module, NAMES[0])(Encoder(), **options).compute_loss_from_embeddings(embeddings, None).backward()
        return embeddings[1].grad.double()

    exact, own, rounded = (
        gradient(*x) for x in [(theirs, torch.float64), (ours, torch.float32), (theirs, torch.float32)]
    )
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=0)
    assert not torch.allclose(rounded, exact, rtol=0.1, atol=0)


def test_dropout_is_replayed(ours, theirs):
    assert_same(*(trained(module, NAMES[1], columns(1), dropout=0.5) for module in (ours, theirs)))


@pytest.mark.parametrize("name", NAMES)
def test_matryoshka_around_it(name, ours, theirs):
    """It shortens the embeddings of the plain loss by the model, and of the cached loss by the method."""
    results = []
    for module in (ours, theirs):
        model = Encoder().double()
        theirs.MatryoshkaLoss(model, getattr(module, name)(model), [WIDTH, WIDTH // 2])(columns(1), None).backward()
        results.append([model.linear.weight.grad])
    assert_same(*results)


def test_evaluation_has_no_gradient(ours, theirs):
    with torch.no_grad():
        values = [getattr(module, NAMES[1])(Encoder().double())(columns(1), None) for module in (ours, theirs)]
    assert_same(*([value] for value in values))


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_those_of_the_package(name, ours, theirs):
    one, other = (getattr(module, name)(Encoder().double(), scale=5.0) for module in (ours, theirs))
    assert isinstance(one, getattr(theirs, name))
    assert one.get_config_dict() == other.get_config_dict() and one.citation == other.citation
    one.scale = other.scale = 9.0
    assert_same(*([loss(columns(1), None).detach()] for loss in (one, other)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_supported_is_named(name, ours, util):
    loss = getattr(ours, name)
    with pytest.raises(UserError, match="similarity_fct: got euclidean_sim, expected cos_sim or dot_score"):
        loss(Encoder(), similarity_fct=util.euclidean_sim)
    for mode in ("in_batch_negatives", "all_negatives"):
        with pytest.raises(UserError, match=f"hardness_mode: got '{mode}', expected None or 'hard_negatives'"):
            loss(Encoder(), hardness_mode=mode, hardness_strength=9.0)
    with pytest.raises(ValueError, match="Scale must be a positive value"):
        loss(Encoder(), scale=0.0)
    later = loss(Encoder().double())
    later.similarity_fct = util.manhattan_sim
    with pytest.raises(UserError, match="similarity_fct: got manhattan_sim"):
        later(columns(1), None)


def imported_with(monkeypatch, package):
    name = "sclkern.integrations.sentence_transformers"
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError) as error:
        importlib.import_module(name)
    return str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    message = imported_with(monkeypatch, None)
    assert message.startswith("sentence_transformers: cannot be imported (")
    assert message.endswith("); pip install 'sentence-transformers[train]>=6'")


def test_an_old_package_is_named(monkeypatch):
    class Old(SimpleNamespace):
        __path__ = ()

    for name in ("util", "sentence_transformer"):
        module = Old(losses=SimpleNamespace())
        monkeypatch.setitem(sys.modules, f"sentence_transformers.{name}", module)
    message = imported_with(monkeypatch, Old(__version__="5.7.0", util=SimpleNamespace(), SentenceTransformer=object))
    assert message.startswith("sentence_transformers: got 5.7.0, expected 6 or newer")
    assert "pip install --upgrade" in message


WORDS = (
    *("a", "the", "red", "blue", "square", "circle", "left", "right"),
    *("big", "small", "dog", "cat", "sits", "runs", "under", "over"),
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, ours):
    """A transformer of random weights with a tokenizer of sixteen words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **sizes)).save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = Pooling(32)
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "whole"))
    return folder / "whole"


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_of_the_package(name, model_folder, ours, theirs, tmp_path):
    """One changed line: the class of the loss."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(WORDS), (3, 16, 5), generator=generator).tolist()
    texts = {
        column: [" ".join(WORDS[word] for word in text) for text in drawn]
        for column, drawn in zip(("anchor", "positive", "negative"), draw, strict=True)
    }
    weights = []
    for module in (ours, theirs):
        model = SentenceTransformer(str(model_folder), device="cpu")
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to="none", use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-3, seed=0, optim="sgd",
        )  # fmt: skip
        loss = getattr(module, name)(model, **({"mini_batch_size": 3} if name.startswith("Cached") else {}))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        # With a fingerprint: datasets 5.2 cannot compute one with pyarrow 26.
        dataset = Dataset(InMemoryTable(pyarrow.table(texts)), fingerprint="texts")
        SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss).train()
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
        weights.append(model.state_dict())
        assert json.dumps(loss.get_config_dict())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
