"""`python -m ngrpo_ops neighbors`: what it reads of a checkpoint, what it prints and draws, and its errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, tiny_model, tokenizer
from safetensors import safe_open

from ngrpo_ops import checkpoint, nearest_neighbors
from ngrpo_ops.__main__ import main
from ngrpo_ops.tokens import is_reserved


@pytest.fixture(scope="module", params=["qwen2", "gpt2", "sharded"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = tiny_model("qwen2" if request.param == "sharded" else request.param)
    model.resize_token_embeddings(VOCABULARY + 3)  # rows that no token has, as padded vocabularies have them
    model.save_pretrained(path, **({"max_shard_size": "10KB"} if request.param == "sharded" else {}))
    assert (path / "model.safetensors.index.json").exists() == (request.param == "sharded")
    tokenizer().save_pretrained(path)
    torch.save(model.get_input_embeddings().weight.detach(), path / "expected.pt")
    return path


def test_the_input_embedding_alone_is_read(folder, monkeypatch):
    read = []
    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: Spy(safe_open(*a, **k), read))
    vocabulary = checkpoint.load_vocabulary(str(folder))
    assert torch.equal(vocabulary.embedding, torch.load(folder / "expected.pt"))
    assert len(read) == 1
    assert vocabulary.unused.nonzero().flatten().tolist() == list(range(VOCABULARY, VOCABULARY + 3))
    assert vocabulary.names[-1] == f"<unused {VOCABULARY + 2}>" and vocabulary.names[5] == "w5"
    assert bool(vocabulary.special[:2].all()) and not vocabulary.special[5]


class Spy:
    def __init__(self, file, read):
        self.file, self.read = file, read

    def __enter__(self):
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *exc):
        return self.file.__exit__(*exc)

    def keys(self):
        return self.opened.keys()

    def get_tensor(self, name):
        self.read.append(name)
        return self.opened.get_tensor(name)


def test_the_table_names_neighbors_and_scores(folder, capsys):
    assert main(["neighbors", "--model", str(folder), "--tokens", "w5", "--ids", "9", "--k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = torch.load(folder / "expected.pt")
    allowed = (torch.arange(VOCABULARY + 3) > 2) & (torch.arange(VOCABULARY + 3) < VOCABULARY)
    found = nearest_neighbors(table, 3, queries=torch.tensor([5, 9]), allowed=allowed)
    assert f"{VOCABULARY + 3} rows of {table.shape[1]}" in lines[0]
    assert lines[0].endswith("3 special, 3 unused, 0 equal to another")
    assert lines[2] == "'w5' (5)" and lines[7] == "'w9' (9)"
    for line, i, score in zip(lines[3:6], found.ids[0].tolist(), found.scores[0].tolist(), strict=True):
        assert f"{score:.4f}" in line and f"({i})" in line


def test_excluded_rows_are_never_neighbors(folder, capsys):
    k = str(VOCABULARY - 4)  # all that are left
    for chosen in ([], ["--exclude", "special", "unused"]):
        main(["neighbors", "--model", str(folder), "--ids", "5", "--k", k, *chosen])
        printed = capsys.readouterr().out
        assert "<unused" not in printed and " special\n" not in printed.split("\n", 1)[1]
    main(["neighbors", "--model", str(folder), "--ids", "5", "--k", str(VOCABULARY), "--exclude", "none"])
    printed = capsys.readouterr().out
    assert "<unused" in printed and "  special" in printed


def test_rows_equal_to_another_are_left_out_unless_asked_for(tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[[9, 30, 31]] = model.get_input_embeddings().weight[9].clone()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    main(["neighbors", "--model", str(tmp_path), "--ids", "9"])
    printed = capsys.readouterr().out
    assert "3 equal to another" in printed and "(30)" not in printed and "(31)" not in printed
    main(["neighbors", "--model", str(tmp_path), "--ids", "9", "--exclude", "special"])
    printed = capsys.readouterr().out
    assert "'w30' (30)  equal\n" in printed and "'w31' (31)  equal\n" in printed


def test_the_picture_is_drawn(folder, tmp_path, capsys):
    picture = tmp_path / "neighbors.png"
    main(["neighbors", "--model", str(folder), "--plot", str(picture), "--sample", "20", "--k", "2"])
    assert picture.read_bytes().startswith(b"\x89PNG") and "20 of 20 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "w5 w6"], r"'w5 w6' must be a single token, got 2: 'w5', 'w6'"),
        (["--ids", "1000"], r"--ids must be within \[0, 70\), got 1000"),
        (["--ids", "5", "--k", "70"], "k must be"),
        (["--ids", "5", "--k", "69"], "--exclude must leave more than --k = 69 rows, got 64"),
        ([], "give --tokens, --ids or --plot"),
        (["--ids", "5", "--metric", "manhattan"], "invalid choice"),
    ],
)
def test_bad_input_is_named(folder, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["neighbors", "--model", str(folder), *arguments])
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("token", "reserved"),
    [
        ("[unused12]", True),
        ("<unused3>", True),
        ("<|reserved_special_token_7|>", True),
        ("unused", False),
        ("[12]", False),
    ],
)
def test_tokens_that_hold_a_place_count_as_unused(token, reserved):
    assert is_reserved(token) == reserved


def test_a_folder_without_a_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["neighbors", "--model", str(tmp_path), "--ids", "1"])
    assert "no model.safetensors" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"not found.*lm_head\.weight"):
        checkpoint._embedding_name(["lm_head.weight"])
