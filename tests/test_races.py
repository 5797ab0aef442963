"""No kernel reads or writes outside its arguments, and none depends on the order of its programs.

Every case runs a kernel in small tiles, so that a small input takes several programs, and names the kernels it is a
case of. A kernel without a case fails a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from races import watched
from torch import Tensor

from ngrpo_ops import decode_step, gaussian_noise, group_advantages, mix_embeddings, selective_log_softmax
from ngrpo_ops.kernels import configs, nearest_neighbors, nearest_neighbors_few, nearest_neighbors_rows
from ngrpo_ops.kernels import group_advantages as advantage_kernels
from ngrpo_ops.kernels import mix_embeddings as mix_kernels
from ngrpo_ops.kernels import selective_log_softmax as log_softmax_kernels
from ngrpo_ops.kernels.primitives import forced_int64
from ngrpo_ops.ops.group_advantages.reference import GroupSettings
from ngrpo_ops.testing import DEVICE, LAYOUTS, METRICS, STRATEGIES, lay_out

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter is what is watched"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, of the faulty rows
]

_FAULTS = (torch.nan, torch.inf, -torch.inf)
ORDERS = tuple(itertools.permutations(_FAULTS))[::2]  # each of the three first, in the middle and last


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """At most 16 rows or columns a tile; those that append take 64 columns at least."""
    for kernel, blocks in configs._INTERPRETED.items():
        least = 64 if kernel.startswith("append_pairs") else 16
        small = {name: min(size, least if name == "BLOCK_N" else 16) for name, size in blocks.items()}
        small |= {name: min(size, 32) for name, size in blocks.items() if name in ("BLOCK_V", "BLOCK_K")}
        monkeypatch.setitem(configs._INTERPRETED, kernel, small)


def _normal(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return lay_out(torch.randn(shape, dtype=torch.float32).to(dtype), layout)


def _faulty(x: Tensor, order: tuple[float, ...]) -> Tensor:
    """First, middle and last row with a NaN, a +inf, or nothing but -inf."""
    for row, fault in zip((0, x.shape[0] // 2, x.shape[0] - 1), order, strict=True):
        x[row, slice(None) if fault == -torch.inf else x.shape[1] // 3] = fault
    return x


# The cases --------------------------------------------------------------------------------------------------------


def _decode(strategy: str, order: tuple[float, ...], layout: str, cut: bool, dtype: torch.dtype, **other: Any) -> None:
    b, v, d, k = 5, 70, 21, 3
    logits = lay_out(_faulty(_normal(b, v, dtype=dtype), order), layout)
    filters = {"top_k": torch.tensor([1, 5, 2, 0, 90]), "top_p": 0.8, "min_p": torch.full((b,), 0.01)}
    temperature = torch.tensor([1.0, 0.7, 2.0, 0.0, 1.0]) if cut else 0.9
    neighbors = torch.randint(-1, v + 1, (v, k - 1)) if strategy == "neighbor" else None
    decode_step(
        logits, _normal(v, d, layout=layout), neighbors, strategy=strategy, mixing_rate=0.5, seed=3, step=4,
        k=None if strategy in ("neighbor", "anchor") else k, temperature=temperature, backend="triton",
        **(filters if cut else {}), **other,
    )  # fmt: skip


def _ids(n: int, k: int, v: int) -> Tensor:
    """Some candidates everywhere, so that their segments are long; some outside of the vocabulary."""
    ids = torch.randint(v, (n, k))
    ids[: 3 * n // 4] = 7
    ids[-5:, 2] = v - 1
    ids[-1, 0], ids[-2, 1] = v, -5
    return ids


def _mix(order: tuple[float, ...], layout: str, deterministic: bool, dtype: torch.dtype = torch.float32) -> None:
    n, v, d, k = 60, 43, 21, 3
    table = lay_out(_faulty(_normal(v, d, dtype=dtype), order), layout)
    ids, weights = _ids(n, k, v), torch.rand(n, k)
    weights[::3, 1] = 0.0
    grad = lay_out(_faulty(_normal(n, d, dtype=dtype), order), layout)
    mix_kernels.forward(table, ids, weights, 3)
    mix_kernels.grad_weights(grad, table, ids, weights, 3)
    mix_kernels.grad_embedding(grad, table, ids, weights, 3, deterministic)


def _mix_operation(layout: str) -> None:
    table, ids, weights = _normal(43, 21, layout=layout), _ids(60, 3, 41).clamp(0, 42), torch.rand(60, 3)
    table.requires_grad_()
    mix_embeddings(table, ids, weights.requires_grad_(), backend="triton").sum().backward()


def _log_softmax(order: tuple[float, ...], layout: str, entropy: bool, in_place: bool) -> None:
    b, t, v, k = 2, 3, 70, 2
    rows = lay_out(_faulty(_normal(b * t, v), order).view(b, t, v), layout)
    ids = torch.randint(v, (b * t, k))
    ids[0, 0], ids[-1, 1], ids[2, 0] = v, -1, v - 1
    out, entropies, normalizer = log_softmax_kernels.forward(rows, ids, 0.7, entropy)
    log_softmax_kernels.backward(
        torch.ones_like(out), torch.ones_like(entropies), rows, ids, entropies, normalizer, 0.7, in_place
    )


def _log_softmax_operation() -> None:
    logits = _normal(2, 4, 70)[:, :-1].requires_grad_()
    out, entropy = selective_log_softmax(
        logits, torch.randint(70, (2, 3)), temperature=0.7, return_entropy=True, backend="triton"
    )
    (out.sum() + entropy.sum()).backward()


def _advantages(faults: tuple[float, ...], layout: str, **changes: Any) -> None:
    groups, size, columns = 19, 5, 3
    rewards = _faulty(_normal(groups * size, columns), faults)
    rewards = lay_out(rewards, layout)
    usual = {
        "weights": None, "order": None, "offsets": None, "group_size": size, "baseline": "mean", "scale": "std",
        "ddof": 1, "eps": 1e-4, "singleton_groups": "zero", "omit_nan": False,
    }  # fmt: skip
    settings = GroupSettings(**usual | changes)
    out, scales = advantage_kernels.forward(rewards, settings)
    advantage_kernels.backward(lay_out(torch.ones_like(out), layout), torch.ones_like(scales), rewards, settings)


def _ragged_advantages(faults: tuple[float, ...], layout: str, offsets: list[int]) -> None:
    n = 95
    rows = torch.randperm(n)
    _advantages(
        faults, layout, weights=(torch.rand(n) < 0.8).long(), order=rows, offsets=torch.tensor(offsets),
        baseline="leave_one_out", singleton_groups="keep", omit_nan=True,
    )  # fmt: skip


def _advantages_operation() -> None:
    rewards = _normal(40, 2).requires_grad_()
    group_advantages(rewards, group_ids=torch.randint(9, (40,)), backend="triton").sum().backward()


def _noise(layout: str) -> None:
    mixed, rows = _normal(7, 37, layout=layout), torch.arange(7)
    mixed[3, 5] = torch.nan
    gaussian_noise(mixed, 0.3, seed=1, row_ids=rows, steps=rows, backend="triton")


def _prepared(rows: int, metric: str) -> Tensor:
    if metric == "l1":
        return _normal(rows, 37)
    return torch.randint(-2, 3, (rows, 2 * nearest_neighbors.STEP)).bfloat16()


def _keep_best(metric: str, capacity: int, room: int) -> None:
    pairs = nearest_neighbors.no_pairs(130, capacity, DEVICE)
    pairs.counts.copy_(torch.randint(capacity - room + 1, (130,)).int())
    pairs.columns.copy_(torch.stack([torch.randperm(40)[:capacity] for _ in range(130)]))
    pairs.scores.copy_(torch.randn(130, capacity))
    x, y = torch.rand(130), torch.rand(40)
    lowest = torch.full((130,), -torch.inf)
    nearest_neighbors.keep_best(
        pairs, metric, lowest, lowest.clone(), torch.zeros(130, dtype=torch.bool), x, 0.01 * x, y, 0.01 * y,
        k=2, kept=5, rounding=1e-5, underflow=0.0,
    )  # fmt: skip


def _append(metric: str, order: tuple[float, ...], capacity: int, threshold: float) -> None:
    """A buffer with room for all, for some and for none."""
    x, y = _faulty(_prepared(37, metric), order), _prepared(131, metric)
    x_limits, y_limits = torch.full((37,), threshold), torch.full((131,), threshold)
    y_limits[7] = torch.inf
    if capacity == 0:  # every pair of a row, in many rounds
        x_limits[5] = -torch.inf
    pairs = nearest_neighbors.no_pairs(200, capacity, DEVICE)
    excluded, allowed = torch.randint(-1, 131, (37,)).int(), torch.rand(131) < 0.7
    nearest_neighbors.append_pairs(x, y, metric, x_limits, excluded, pairs, x_ids=3, y_ids=torch.randperm(200)[:131])
    for rows, limits, diagonal in ((x, x_limits, False), (y, y_limits, True)):
        pairs = nearest_neighbors.no_pairs(200, capacity, DEVICE)
        nearest_neighbors.append_pairs_symmetric(
            rows, y, metric, limits, y_limits, allowed[: len(rows)], allowed, pairs, x_ids=5, y_ids=9,
            diagonal=diagonal,
        )  # fmt: skip


def _rows(metric: str, order: tuple[float, ...], layout: str) -> None:
    x = lay_out(_faulty(_normal(37, 71), order), layout)
    norms, inverse_norms, roundoffs, _ = nearest_neighbors_rows.row_statistics(x, metric)
    scales = inverse_norms if metric == "cosine" else None
    nearest_neighbors_rows.row_movements(x, scales, lay_out(x + 0.1, "sliced"), scales, metric)
    rows, columns = torch.randint(37, (45,)), torch.randint(37, (45,))
    nearest_neighbors.pair_scores(x, scales, rows, x, scales, columns, metric)
    if metric != "l1":
        for chosen in (None, slice(3, 30), rows):
            nearest_neighbors_rows.prepare_rows(
                x, chosen, norms, inverse_norms, roundoffs, metric, queries=chosen is None, rounding=1e-4,
                underflow=1e-36,
            )  # fmt: skip


def _score_few(metric: str, order: tuple[float, ...], layout: str) -> None:
    y = lay_out(_faulty(_normal(1030, 71), order), layout)
    norms, inverse_norms, roundoffs, _ = nearest_neighbors_rows.row_statistics(y, metric)
    prepared = nearest_neighbors_rows.prepare_rows(
        y, None, norms, inverse_norms, roundoffs, metric, queries=True, rounding=1e-4, underflow=1e-36
    )
    nearest_neighbors_few.score_few(
        prepared[:19], norms[:19], roundoffs[:19], y, metric, rounding=1e-4, underflow=1e-36
    )


class Case(NamedTuple):
    name: str
    run: Callable[[], None]
    kernels: set[str]
    slow: bool = False


def _cases() -> list[Case]:
    cases: list[Case] = []

    def add(name: str, kernels: set[str], function: Callable[..., None], *args: Any, slow: bool = False, **kw: Any):
        cases.append(Case(name, lambda: function(*args, **kw), kernels, slow))

    fp32, bf16 = torch.float32, torch.bfloat16
    for i, (strategy, cut) in enumerate(itertools.product(STRATEGIES, (False, True))):
        for j, order in enumerate(ORDERS):
            draws = {"decode_draws_kernel"} if strategy in ("moi", "multiplex") else set()
            filters = {"decode_gather_kernel", "decode_filter_kernel"} if cut else set()
            add(
                f"decode, {strategy}{', cut' if cut else ''}, {order}",
                {"decode_partials_kernel", "decode_choice_kernel"} | draws | filters,
                _decode, strategy, order, LAYOUTS[(i + j) % 4], cut, (fp32, bf16)[(i + j) % 2],
                slow=cut or j > 0,
            )  # fmt: skip
    add(
        "decode, every filter",
        {"decode_partials_kernel", "decode_choice_kernel", "decode_gather_kernel", "decode_filter_kernel"},
        _decode, "neighbor", ORDERS[1], "sliced", True, fp32, enabled=torch.arange(5) % 2 == 0,
    )  # fmt: skip
    forward = {"mix_forward_kernel", "mix_grad_weights_kernel"}
    segments = {"mix_grad_embedding_kernel", "mix_grad_long_segments_kernel", "mix_grad_merge_kernel"}
    segments |= {"mix_keys_kernel", "mix_offsets_kernel"}
    for i, order in enumerate(ORDERS):
        for deterministic in (True, False):
            add(
                f"mix, {'in order' if deterministic else 'atomic'}, {order}",
                forward | (segments if deterministic else {"mix_grad_atomic_kernel"}),
                _mix, order, LAYOUTS[i], deterministic, slow=i > 0,
            )  # fmt: skip
    add("mix, operation", forward | segments, _mix_operation, "transposed", slow=True)
    both = {f"selective_log_softmax_{name}_kernel" for name in ("partials", "forward", "backward")}
    for i, order in enumerate(ORDERS):
        for entropy, in_place in itertools.product((False, True), repeat=2):
            name = f"log-softmax{', entropy' if entropy else ''}{', in place' if in_place else ''}, {order}"
            add(name, both, _log_softmax, order, LAYOUTS[i + entropy], entropy, in_place, slow=i > 0 or entropy)
    add("log-softmax, operation", both, _log_softmax_operation)
    both = {"group_advantages_kernel", "group_advantages_backward_kernel"}
    for i, order in enumerate(ORDERS):
        add(f"advantages, {order}", both, _advantages, order, LAYOUTS[i], slow=i > 0)
        add(f"advantages, mean, {order}", both, _advantages, order, LAYOUTS[i + 1], scale="mean", baseline="none",
            slow=True)  # fmt: skip
    usual = [0, 1, 4, 4, *range(9, 96, 5), 95]
    for offsets in (usual, [0, 3, *range(10, 96, 4), 120], [-2, *range(3, 90, 4)]):
        add(f"advantages, ragged, {offsets[:3]}", both, _ragged_advantages, ORDERS[0], "transposed", offsets)
    add("advantages, operation", both, _advantages_operation)
    for layout in LAYOUTS:
        add(f"noise, {layout}", {"gaussian_noise_kernel"}, _noise, layout)
    appends = {"append_pairs_kernel", "append_pairs_symmetric_kernel"}
    for metric, (i, order) in itertools.product(("dot", "l1"), enumerate(ORDERS)):
        capacity, threshold = (200, 5, 0)[i], {"dot": 60.0, "l1": -33.0}[metric]
        add(f"append, {metric}, {order}", appends, _append, metric, order, capacity, threshold, slow=i > 0)
        for room in (-3, 3):  # queries with more pairs than places, and without
            add(f"keep best, {metric}, {i}, {room}", {"keep_best_kernel"}, _keep_best, metric, 20, room, slow=i > 0)
    for i, metric in enumerate(METRICS):
        kernels = {"row_statistics_kernel", "row_movements_kernel", "pair_scores_kernel"}
        kernels |= set() if metric == "l1" else {"prepare_rows_kernel"}
        for j, order in enumerate(ORDERS):
            add(f"rows, {metric}, {order}", kernels, _rows, metric, order, LAYOUTS[(i + j) % 4], slow=j > 0)
            if metric != "l1":
                few = {"row_statistics_kernel", "prepare_rows_kernel", "score_few_kernel"}
                add(f"few, {metric}, {order}", few, _score_few, metric, order, LAYOUTS[(i + j) % 4], slow=j > 0)
    return cases


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES]
)
def test_no_race_and_nothing_outside(case):
    torch.manual_seed(0)
    with watched() as watch:
        case.run()
    assert watch.faults == []
    assert set(watch.programs) == case.kernels
    alone = {kernel for kernel, programs in watch.programs.items() if programs < 2}
    assert not alone, "one program cannot race"


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if not case.slow])
def test_the_64_bit_form_stays_inside_too(case):
    torch.manual_seed(0)
    with watched() as watch, forced_int64():
        case.run()
    assert watch.faults == []


def test_offsets_that_fall_stay_inside():
    """Bad input that nobody looks at on a GPU: rows of two groups get the advantage of either, and no more happens."""
    with watched() as watch:
        _ragged_advantages(ORDERS[0], "contiguous", [0, 5, 2, *range(10, 96, 4), 120])
    assert watch.faults and not any("outside" in fault for fault in watch.faults)


def test_every_kernel_has_a_case():
    assert set().union(*(case.kernels for case in CASES if not case.slow)) == set(configs.PINNED)
