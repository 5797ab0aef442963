"""Rows that no token stands for: what a tokenizer tells of them, and that they are no neighbors in a rollout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, left_padded, tiny_model, tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from ngrpo_ops import MixingConfig
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.rollout import make_table
from ngrpo_ops.tokens import read_excluded, special_rows

WORDS = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "<unused1>": 4, "b": 5}
NAMED = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python alone."""

    @property
    def vocab_size(self) -> int:
        return len(WORDS)

    def get_vocab(self) -> dict[str, int]:
        return WORDS | self.added_tokens_encoder

    def _convert_token_to_id(self, token: str) -> int:
        return WORDS.get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return {i: word for word, i in WORDS.items()}[index]


# What a tokenizer tells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fast", "slow", "processor", "backend"])
def test_rows_without_a_token_and_special_tokens_are_found(kind: str) -> None:
    backend = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    if kind == "backend":
        given = backend
        backend.add_special_tokens([*NAMED.values(), "<turn>"])
        backend.add_tokens(["<mine>"])
    else:
        given = SlowTokenizer(**NAMED) if kind == "slow" else PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
        given.add_tokens([AddedToken("<turn>", special=True)])  # special, and in none of the special tokens' names
        given.add_tokens(["<mine>"])
    assert given.get_vocab() == WORDS | {"<turn>": 6, "<mine>": 7}
    found = special_rows(SimpleNamespace(tokenizer=given) if kind == "processor" else given, 10)
    assert found.special.nonzero().flatten().tolist() == [0, 1, 2, 4, 6]
    assert found.beyond.nonzero().flatten().tolist() == [8, 9]


def test_an_id_that_is_left_out_has_no_token() -> None:
    found = special_rows(Tokenizer(WordLevel({"a": 0, "b": 3})), 5)
    assert found.beyond.tolist() == [False, True, True, False, True] and not found.special.any()


def test_a_tokenizer_with_more_tokens_than_rows_and_no_tokenizer() -> None:
    found = special_rows(tokenizer(), 5)
    assert found.special.tolist() == [True, True, True, False, False] and not found.beyond.any()
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers, or have one, got object"):
        special_rows(object(), 5)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("special", "special"), (["special"], "special"), ("none", None), (["None"], None), (None, None),
        (["5", "6"], [5, 6]), ([5, 6], [5, 6]), ("7", [7]), (7, [7]), ([], []),
    ],
)  # fmt: skip
def test_words_of_a_command_line_are_read(words: object, value: object) -> None:
    assert read_excluded(words) == value  # type: ignore[arg-type]


@pytest.mark.parametrize("words", ["all", ["special", "5"], ["-1"], -7, ["1.5"], 0.5])
def test_other_words_are_refused(words: object) -> None:
    with pytest.raises(ValueError, match="excluded_token_ids must be 'special' or a list of token ids"):
        MixingConfig(excluded_token_ids=read_excluded(words))  # type: ignore[arg-type]


# What a rollout mixes ---------------------------------------------------------------------------------------------

ADDED = 8  # rows that a resize has added
MINE = VOCABULARY  # a token of the user's, in the first of them
RESERVED = [20, 33, 34, 50]  # rows that were never trained: one value


def leaning_model() -> nn.Module:
    """Its table leans one way, and is resized as transformers does it: to the mean of all rows, and little noise."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(torch.randn(weight.shape, generator=generator) + 2 * torch.randn(32, generator=generator))
        mean = weight.mean(0)
        model.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
        weight = model.get_input_embeddings().weight
        weight[VOCABULARY:] = mean + 1e-3 * torch.randn(ADDED, 32, generator=generator)
        weight[RESERVED] = weight[RESERVED[0]].clone()
    return model


def my_tokenizer() -> PreTrainedTokenizerFast:
    mine = tokenizer()
    mine.add_tokens(["<mine>"])
    assert mine.get_vocab()["<mine>"] == MINE
    return mine


def nearest(table: Tensor, allowed: set[int], k: int) -> Tensor:
    """The k nearest allowed rows by cosine, in float64: each pair by itself."""
    rows = nn.functional.normalize(table.double(), dim=1)
    ids = sorted(allowed)
    found = []
    for i in range(len(rows)):
        scored = sorted((-float(rows[i] @ rows[j]), j) for j in ids if j != i)
        found.append([j for _, j in scored[:k]])
    return torch.tensor(found)


def mixed(config: MixingConfig) -> tuple[Tensor, Tensor]:
    """The neighbors of every token, and those in a rollout's mixes."""
    mixing = NeighborMixing(leaning_model(), config, tokenizer=my_tokenizer())
    _, record = mixing.generate(**left_padded(), do_sample=True, max_new_tokens=12, min_new_tokens=12)
    assert mixing.table is not None
    return mixing.table.ids, record.ids[record.gate][:, 1:]


def test_rows_that_no_token_stands_for_are_no_neighbors() -> None:
    table = leaning_model().get_input_embeddings().weight.detach()
    everything = set(range(VOCABULARY + ADDED))
    beyond = set(range(MINE + 1, VOCABULARY + ADDED))
    words = everything - beyond - {0, 1, 2} - set(RESERVED)
    ids, rolled = mixed(MixingConfig(mixing_rate=1.0, excluded_token_ids="special"))
    assert torch.equal(ids, nearest(table, words, 2))
    assert set(rolled.flatten().tolist()) <= words
    assert MINE in ids  # as near to everything as the rows beside it, and a token that the user has added
    ids, rolled = mixed(MixingConfig(mixing_rate=1.0))
    assert not torch.isin(ids[RESERVED[0]], torch.tensor(sorted(words))).any()  # its equals are its neighbors
    share = torch.isin(ids, torch.tensor(sorted(beyond))).double().mean()
    assert share > 0.5 and torch.isin(rolled, torch.tensor(sorted(beyond))).double().mean() > 0.5
    rows = nn.functional.normalize(table.double(), dim=1)
    scores = (rows @ rows.T).fill_diagonal_(-2.0)
    assert float((scores.gather(1, ids) - scores.topk(2).values).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"excluded_token_ids": [5, 6, 7]}, set(range(75)) - {5, 6, 7}),
        ({"excluded_token_ids": [5, 6], "allowed_token_ids": range(4, 12)}, {4, 7, 8, 9, 10, 11}),
        ({"excluded_token_ids": "special", "allowed_token_ids": range(25)}, set(range(3, 25)) - {20}),
        ({"excluded_token_ids": []}, set(range(75))),
    ],
)
def test_excluded_tokens_are_taken_from_those_allowed(settings: dict, allowed: set[int]) -> None:
    table = make_table(MixingConfig(**settings), 75, my_tokenizer())
    assert table is not None
    embedding = leaning_model().get_input_embeddings().weight.detach()
    table.refresh(embedding)
    want = nearest(embedding, allowed, 2)
    rows = nn.functional.normalize(embedding.double(), dim=1)
    scores = rows @ rows.T
    assert set(table.ids.flatten().tolist()) <= allowed
    assert torch.allclose(scores.gather(1, table.ids), scores.gather(1, want), atol=1e-6)  # equal rows are tied


def test_the_log_says_once_how_many_rows_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    try:
        mixing = NeighborMixing(leaning_model(), MixingConfig(excluded_token_ids="special"), my_tokenizer())
        mixing.refresh()
        mixing.refresh()
        NeighborMixing(leaning_model(), MixingConfig()).refresh()
        NeighborMixing(leaning_model(), MixingConfig(excluded_token_ids="special", strategy="topk")).refresh()
    finally:
        logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records if "no neighbors" in record.getMessage()]
    assert said == [
        "14 of 75 token embeddings are no neighbors (excluded_token_ids='special'): 7 beyond the tokenizer, 3 of "
        "special or reserved tokens, 4 equal to another"
    ]


def test_special_needs_a_tokenizer_where_neighbors_are_read() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"excluded_token_ids='special'.*: give one, or set excluded_token_ids=None"):
        NeighborMixing(model, MixingConfig(excluded_token_ids="special"))
    assert not model.get_input_embeddings()._forward_hooks
    for harmless in ({"strategy": "topk"}, {"strategy": "anchor"}, {"k": 1}, {"mixing_rate": 0.0}):
        NeighborMixing(tiny_model(), MixingConfig(excluded_token_ids="special", **harmless))  # type: ignore[arg-type]


def test_too_few_tokens_left_are_refused() -> None:
    few = r"^allowed_token_ids without excluded_token_ids must leave at least k = 3 tokens, got 2$"
    with pytest.raises(ValueError, match=few):
        MixingConfig(allowed_token_ids=[3, 4, 5, 6], excluded_token_ids=[5, 6])
    config = MixingConfig(allowed_token_ids=[0, 1, 2, 3, 4], excluded_token_ids="special")
    with pytest.raises(ValueError, match=few):
        NeighborMixing(tiny_model(), config, tokenizer())
    with pytest.raises(ValueError, match=few):
        NeighborMixing(tiny_model(), MixingConfig(excluded_token_ids=range(VOCABULARY - 2)))
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = 1.0
    mixing = NeighborMixing(model, MixingConfig(excluded_token_ids="special"), tokenizer())
    equal = f"excluded_token_ids='special' must leave at least 3 rows .*, got 2: {VOCABULARY - 5} of {VOCABULARY} rows"
    with pytest.raises(ValueError, match=equal):
        mixing.refresh()
