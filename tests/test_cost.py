"""docs/cost.md: each formula of bytes against what the code allocates."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from ngrpo_ops import MixingConfig, MixRecord, NeighborTable, decode_step, mix_embeddings, nearest_neighbors
from ngrpo_ops import selective_log_softmax as log_softmax

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/cost.md").read_text()
SIZES = [{"V": 400, "d": 8, "k": 3, "e": 2, "B": 5, "T": 7, "M": 4, "N": 4096, "Q": 6, "S": 3, "L": 11}]
SIZES += [{"V": 640, "d": 24, "k": 5, "e": 4, "B": 2, "T": 9, "M": 6, "N": 8192, "Q": 9, "S": 5, "L": 4}]
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def formula(start: str, **sizes: int) -> int:
    """The first formula after the words with which a row or a sentence of the page starts."""
    (line,) = [line for line in PAGE.splitlines() if start in line]
    written = re.search(r"`([\w*+() ]*[*+][\w*+() ]*)`", line.partition(start)[2])
    assert written is not None, line
    return eval(written[1], {"__builtins__": {}}, sizes)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(params=SIZES, ids=["bfloat16", "float32"])
def sizes(request: pytest.FixtureRequest) -> dict[str, int]:
    return request.param


@pytest.mark.parametrize(
    ("start", "excludes"), [("neighbor table, in TRL", True), ("neighbor table with `excluded", False)]
)
def test_the_neighbor_table(start: str, excludes: bool, sizes: dict[str, int]) -> None:
    embedding = torch.randn(sizes["V"], sizes["d"]).to(DTYPES[sizes["e"]])
    table = NeighborTable(sizes["k"] - 1, exclude_equal_rows=excludes)
    table.refresh(embedding)
    assert table.nbytes == formula(start, **sizes)
    embedding[1] = embedding[0]
    table = NeighborTable(sizes["k"] - 1, exclude_equal_rows=excludes)
    table.refresh(embedding)
    assert table.nbytes == formula(start, **sizes) + formula("more where rows", **sizes)


def test_the_records(sizes: dict[str, int]) -> None:
    b, t, k, m = (sizes[name] for name in "BTkM")
    gate = torch.zeros(b, t, dtype=torch.bool)
    gate[0, :m] = True
    weights, logprobs = torch.ones(b, t, k), torch.zeros(b, t)
    record = MixRecord(gate, torch.zeros(b, t, k, dtype=torch.int64), weights, 0, logprobs)
    assert nbytes(*record.tensors().values()) == formula("record of B rollouts", **sizes)
    sparse = record.sparse(0, 0)
    fields = (sparse.steps, sparse.ids, sparse.weights, sparse.logprobs)
    assert nbytes(*fields) == formula("record of a rollout of T", **sizes)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Modules of the vLLM adapter that need no vLLM."""
    name = "ngrpo_ops.integrations.vllm"
    package = types.ModuleType(name)
    package.__path__ = [str(ROOT / "integrations/vllm")]
    monkeypatch.setitem(sys.modules, name, package)
    found = {}
    for module in ("pool", "mixed_requests"):
        monkeypatch.delitem(sys.modules, f"{name}.{module}", raising=False)
        found[module] = importlib.import_module(f"{name}.{module}")
    yield types.SimpleNamespace(**found)
    for module in found:
        sys.modules.pop(f"{name}.{module}", None)


def test_an_engine(engine: types.SimpleNamespace, sizes: dict[str, int]) -> None:
    pool = engine.pool.EntryPool(sizes["k"], torch.device("cpu"))
    pool.reserve(sizes["N"])
    fields = [getattr(pool, name) for name in engine.pool._FIELDS]
    assert nbytes(*fields) == formula("engine: records of N tokens", **sizes)
    requests = engine.mixed_requests.MixedRequests(MixingConfig(), sizes["S"], sizes["L"], pool)
    arrays = [value for value in vars(requests).values() if hasattr(value, "nbytes")]
    assert sum(array.nbytes for array in arrays) == formula("An engine also keeps on the host", **sizes)


def test_the_operations(sizes: dict[str, int]) -> None:
    v, d, k, b, q, m = (sizes[name] for name in "VdkBQM")
    embedding = torch.randn(v, d).to(DTYPES[sizes["e"]])
    assert nbytes(*nearest_neighbors(embedding, k, queries=torch.arange(q))) == formula(
        "`nearest_neighbors` of Q", **sizes
    )
    near = nearest_neighbors(embedding, k - 1).ids
    step = decode_step(torch.randn(b, v), embedding, near, seed=0, step=0)
    assert nbytes(*step) == formula("`decode_step` of B", **sizes)
    mixed = mix_embeddings(embedding, torch.zeros(m, k, dtype=torch.int64), torch.ones(m, k) / k)
    assert nbytes(mixed) == formula("`mix_embeddings` of N", **sizes | {"N": m})
    chosen = log_softmax(torch.randn(m, v), torch.zeros(m, dtype=torch.int64))
    assert nbytes(chosen) == formula("`selective_log_softmax` of N", **sizes | {"N": m})


def test_the_function_of_the_page_is_the_formula_of_the_table() -> None:
    names: dict = {}
    exec(re.search(r"```python\n(def .*?)\n\n", PAGE, flags=re.S)[1], names)
    for sizes in SIZES:
        expected = formula("neighbor table, in TRL", **sizes)
        assert names["table_bytes"](**{name: sizes[name] for name in "Vdke"}) == expected
