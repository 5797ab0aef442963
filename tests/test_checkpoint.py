"""`python -m ngrpo_ops neighbors`: what it reads of a checkpoint, what it prints and draws, and its errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, tiny_model, tokenizer
from safetensors import safe_open
from safetensors.torch import save_file

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


# Damaged files ----------------------------------------------------------------------------------------------------

INDEX, TENSORS, TOKENIZER = "model.safetensors.index.json", "model.safetensors", "tokenizer.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint in one file and one in several, both of which the command reads."""
    folders = {}
    for kind, settings in {"one": {}, "several": {"max_shard_size": "10KB"}}.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_model().save_pretrained(folders[kind], **settings)
        tokenizer().save_pretrained(folders[kind])
    return folders


@pytest.fixture
def broken(whole, tmp_path):
    """Makes a copy of a checkpoint to be broken."""

    def copy(kind: str = "one") -> Path:
        return Path(shutil.copytree(whole[kind], tmp_path / kind))

    return copy


def shard_of(folder: Path) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"]


def complaint(folder: Path, capsys, *arguments: str) -> str:
    """The one line with which the command ends, without a traceback and with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(["neighbors", "--model", str(folder), *(arguments or ("--ids", "5"))])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (found,) = (line for line in lines if "error: " in line)
    assert found == lines[-1], lines
    return found.partition("error: ")[2]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a loop of links":
        path.symlink_to(path.name)
    elif how == "an endless device":
        path.symlink_to("/dev/zero")
    else:
        other = b"PK\x03\x04" + bytes(200) if path.suffix == ".json" else b'{"a": [1, 2]}' * 9
        ways = {"empty": b"", "cut off": content[: len(content) // 2], "cut off by one": content.rstrip()[:-1],
                "of another type": other, "zeros": bytes(len(content)), "a JSON list": b"[1, 2]", "JSON null": b"null",
                "a picture": b"\x89PNG\r\n\x1a\n" * 40}  # fmt: skip
        path.write_bytes(ways[how])


@pytest.mark.parametrize(
    "how",
    ["empty", "cut off", "cut off by one", "of another type", "zeros", "a JSON list", "JSON null", "a picture",
     "a folder", "a pipe", "a loop of links", "an endless device"],
)  # fmt: skip
@pytest.mark.parametrize("name", [INDEX, TENSORS, TOKENIZER, "a shard"])
def test_whatever_is_damaged_is_named(broken, capsys, name, how):
    folder = broken("several" if name in (INDEX, "a shard") else "one")
    path = shard_of(folder) if name == "a shard" else folder / name
    damage(path, how)
    said = complaint(folder, capsys)
    assert said.startswith(f"{path}: "), said


def header(tensors: dict, data: bytes = bytes(4096), length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ROWS = {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}


@pytest.mark.parametrize(
    "content",
    [
        header({"wte.weight": ROWS}, length=2**60),
        header({"wte.weight": ROWS}, length=2**64 - 1),
        header({"wte.weight": ROWS}, length=0),
        header({"wte.weight": ROWS | {"data_offsets": [0, 2**40]}}),
        header({"wte.weight": ROWS | {"data_offsets": [128, 0]}}),
        header({"wte.weight": ROWS | {"shape": [2**40, 2**40]}}),
        header({"wte.weight": ROWS | {"shape": [-8, 4]}}),
        header({"wte.weight": ROWS | {"dtype": "F33"}}),
        header({"wte.weight": ROWS, "other": ROWS}, bytes(128)),
        header({"wte.weight": {"dtype": "F32"}}),
        header({"wte.weight": 5}),
        header([1, 2]),
    ],
    ids=["2^60", "2^64", "0", "beyond the file", "backwards", "a shape too large", "a negative shape", "dtype",
         "overlapping", "parts missing", "a number", "a list"],
)  # fmt: skip
def test_a_header_that_lies_is_named(broken, capsys, content):
    folder = broken()
    (folder / TENSORS).write_bytes(content)
    assert complaint(folder, capsys).startswith(f"{folder / TENSORS}: is no safetensors file, or is damaged: ")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(8), "must be a floating-point table"),
        (torch.zeros(2, 8, 4), "must be a floating-point table"),
        (torch.zeros(()), "must be a floating-point table"),
        (torch.zeros(0, 4), "must not be empty"),
        (torch.zeros(8, 0), "must not be empty"),
        (torch.zeros(8, 4, dtype=torch.int8), "must be a floating-point table"),
        (torch.zeros(8, 4, dtype=torch.float8_e4m3fn), "must be a floating-point table"),
    ],
)
def test_a_tensor_that_is_no_table_is_named(broken, capsys, tensor, message):
    folder = broken()
    save_file({"wte.weight": tensor}, folder / TENSORS)
    assert complaint(folder, capsys).startswith(f"{folder / TENSORS}: wte.weight {message}")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/dev/zero",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        ".hidden",
        "a\\b",
        "a\0b",
        5,
        None,
        ["a"],
    ],
)
def test_an_index_names_files_beside_it_alone(broken, capsys, name):
    folder = broken("several")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.embed_tokens.weight"] = name
    (folder / INDEX).write_text(json.dumps(content))
    said = complaint(folder, capsys)
    assert said == f"{folder / INDEX}: weight_map must have names of files beside it, got {name!r}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "weight_map must map the names of tensors to those of files, got None"),
        ({"weight_map": ["a"]}, "weight_map must map the names of tensors to those of files, got ['a']"),
        ({"weight_map": {}}, "the input embedding was not found"),
        ({"weight_map": {"lm_head.weight": "a"}}, "the input embedding was not found"),
        ({"weight_map": {"wte.weight": "gone.safetensors"}}, "names 'gone.safetensors', which is not in "),
    ],
)
def test_an_index_without_its_map_is_named(broken, capsys, content, message):
    folder = broken("several")
    (folder / INDEX).write_text(json.dumps(content))
    assert complaint(folder, capsys).startswith(f"{folder / INDEX}: {message}")


def test_a_shard_without_the_tensor_of_another_kind_or_unreadable_is_named(broken, capsys, monkeypatch):
    folder = broken("several")
    shard = shard_of(folder)
    save_file({"other": torch.zeros(2, 2)}, shard)
    assert complaint(folder, capsys).startswith(f"{shard}: is no safetensors file, or is damaged: ")
    torch.save({"model.embed_tokens.weight": torch.zeros(8, 4)}, shard)
    assert complaint(folder, capsys).startswith(f"{shard}: is no safetensors file, or is damaged: ")

    def refused(path: object, *arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refused)  # the tests may run as root, whom no permission stops
    assert complaint(folder, capsys) == f"{folder / INDEX}: Permission denied"


def test_tokens_beyond_the_rows_are_named(broken, capsys):
    folder = broken()
    save_file({"wte.weight": torch.rand(20, 4)}, folder / TENSORS)
    assert complaint(folder, capsys, "--tokens", "w30") == (
        "'w30' is token 30, and the embedding has rows for tokens below 20 alone"
    )
    said = complaint(folder, capsys, "--tokens", "w5 w30")
    assert said == "'w5 w30' must be a single token, got 2: 'w5', token 30"
    for i in ("-1", "20", str(10**30)):
        assert complaint(folder, capsys, "--ids", i) == f"--ids must be within [0, 20), got {i}"


def test_what_else_the_command_line_gets_wrong(broken, capsys, tmp_path):
    folder = broken()
    assert "--sample must be at least 0" in complaint(folder, capsys, "--ids", "5", "--sample", "-1")
    said = complaint(folder, capsys, "--plot", str(tmp_path / "nowhere" / "a.png"))
    assert said.startswith("--plot must be in a folder that is there")
    file = folder / TENSORS
    assert complaint(file, capsys) == f"{file}: must be a folder with safetensors, got a file"
    (folder / TOKENIZER).unlink()
    assert complaint(folder, capsys) == f"no tokenizer.json in {str(folder)!r}"


def test_links_of_the_hubs_cache_are_followed(broken, tmp_path, capsys):
    """There a checkpoint's files are links to ../../blobs."""
    folder = broken()
    (tmp_path / "blobs").mkdir()
    for name in (TENSORS, TOKENIZER):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(f"../blobs/{name}")
    assert main(["neighbors", "--model", str(folder), "--ids", "5"]) == 0


def test_a_name_that_is_nowhere(monkeypatch, capsys):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*arguments: object) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    assert complaint(Path("some/model"), capsys) == (
        "no model.safetensors, and no index of one, in 'some/model', no folder here, on the hub or in its cache"
    )
