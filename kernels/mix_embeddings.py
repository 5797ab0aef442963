"""Weighted gather of embedding rows, and its gradients.

Forward: one program a tile of [positions, columns]; ids and weights stay in registers, rows of weight 0 are not read.

Gradient of the embedding, deterministic: the n * K entries (position, candidate) are sorted by id (stable), so that a
row's entries are one segment. A program owns a tile of [vocabulary rows, columns], adds up their segments entry by
entry in float32, of which a few are under way at once, and writes each row once, zero rows included, in the table's
dtype. A token that is everywhere would make one program late: a segment longer than SEGMENT entries is summed by many
programs, each over one SEGMENT-entry tile of the sorted list, and merged in order. No step waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import ceil_div, launch, launcher, next_power_of_2, widen

SEGMENT = 32
_UNDER_WAY = tl.constexpr(4)  # entries of a row that are loaded at once


@triton.jit
def _add_candidate(
    total, bad, embedding, ids, weights, rows, columns, c, n, d, v, stride_v, stride_d, padding_id,
    K: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    token = tl.load(ids + rows * K + c, mask=rows < n, other=0)
    weight = tl.load(weights + rows * K + c, mask=rows < n, other=0.0).to(tl.float32)
    used = (weight != 0.0) & (token != padding_id)
    known = (token >= 0) & (token < v)
    where = embedding + widen(token, INT64)[:, None] * stride_v + columns[None, :] * stride_d
    row = tl.load(where, mask=(used & known)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)
    total += tl.where(used[:, None], weight[:, None] * row, 0.0)
    return total, bad | (used & (known == 0))


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_forward_kernel(
    embedding, ids, weights, out, n, d, v, stride_v, stride_d, padding_id,
    K: tl.constexpr, INT64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = widen(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), INT64)
    columns = widen(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    bad = tl.zeros([BLOCK_N], tl.int1)
    if K <= 8:  # all rows under way at once; more candidates would not fit in the registers
        for c in tl.static_range(K):
            total, bad = _add_candidate(
                total, bad, embedding, ids, weights, rows, columns, c, n, d, v, stride_v, stride_d, padding_id, K, INT64
            )
    else:
        for c in range(K):
            total, bad = _add_candidate(
                total, bad, embedding, ids, weights, rows, columns, c, n, d, v, stride_v, stride_d, padding_id, K, INT64
            )
    total = tl.where(bad[:, None], float("nan"), total)
    mask = (rows < n)[:, None] & (columns < d)[None, :]
    tl.store(out + rows[:, None] * d + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_grad_weights_kernel(
    grad, embedding, ids, out, n, d, v, stride_n, stride_g, stride_v, stride_d, padding_id,
    K: tl.constexpr, BLOCK_C: tl.constexpr, INT64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One dot product an entry. Its two rows are never stored side by side, and the gradient's is read once for all
    candidates of a tile."""
    rows = widen(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), INT64)
    live = rows < n
    for first in range(0, K, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        where = rows[:, None] * K + c[None, :]
        there = live[:, None] & (c < K)[None, :]
        token = tl.load(ids + where, mask=there, other=-1)
        used = (token >= 0) & (token < v) & (token != padding_id)
        candidates = embedding + widen(token, INT64)[:, :, None] * stride_v
        products = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_D], tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = widen(start + tl.arange(0, BLOCK_D), INT64)
            mask = live[:, None] & (columns < d)[None, :]
            g = tl.load(grad + rows[:, None] * stride_n + columns[None, :] * stride_g, mask=mask, other=0.0)
            mask = used[:, :, None] & (columns < d)[None, None, :]
            x = tl.load(candidates + columns[None, None, :] * stride_d, mask=mask, other=0.0)
            products += g.to(tl.float32)[:, None, :] * x.to(tl.float32)
        total = tl.where(used, tl.sum(products, axis=2), 0.0)
        tl.store(out + where, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_keys_kernel(ids, keys, m, v, padding_id, INT64: tl.constexpr, BLOCK_M: tl.constexpr):
    """What the entries are sorted by: those that count for nothing come behind the vocabulary, as row v."""
    entries = widen(tl.program_id(0), INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(ids + entries, mask=entries < m, other=-1)
    used = (token >= 0) & (token < v) & (token != padding_id)
    tl.store(keys + entries, tl.where(used, token, v).to(tl.int32), mask=entries < m)


@triton.jit(do_not_specialize=["n", "m", "v", "halvings"])
def mix_offsets_kernel(sorted_ids, offsets, m, v, halvings, INT64: tl.constexpr, BLOCK_V: tl.constexpr):
    """Where the segments of the rows 0 .. v begin, by binary search."""
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    low = widen(tl.zeros([BLOCK_V], tl.int32), INT64)
    high = low + m
    for _ in range(halvings):
        middle = (low + high) // 2
        less = tl.load(sorted_ids + middle, mask=low < high, other=0) < tokens
        high = tl.where((low < high) & (less == 0), middle, high)
        low = tl.where((low < high) & less, middle + 1, low)
    tl.store(offsets + tokens, low, mask=tokens <= v)


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_grad_embedding_kernel(
    grad, order, offsets, weights, out, d, v, stride_n, stride_g,
    K: tl.constexpr, SEGMENT: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = widen(tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), INT64)
    columns = widen(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    live, inside = tokens < v, columns < d
    start = tl.load(offsets + tokens, mask=live, other=0)
    length = tl.load(offsets + tokens + 1, mask=live, other=0) - start
    mine = live & (length <= SEGMENT)
    length = tl.where(mine, length, 0)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i in range(0, tl.max(length, axis=0).to(tl.int32), _UNDER_WAY):
        for ahead in tl.static_range(_UNDER_WAY):
            more = i + ahead < length
            entry = tl.load(order + start + i + ahead, mask=more, other=0)
            weight = tl.load(weights + entry, mask=more, other=0.0).to(tl.float32)
            more = more & (weight != 0.0)
            where = grad + widen(entry // K, INT64)[:, None] * stride_n + columns[None, :] * stride_g
            g = tl.load(where, mask=more[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.where(more[:, None], weight[:, None] * g, 0.0)
    mask = mine[:, None] & inside[None, :]
    tl.store(out + tokens[:, None] * d + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _is_long(offsets, token, v, SEGMENT: tl.constexpr):
    known = token < v
    start = tl.load(offsets + token, mask=known, other=0)
    return known & (tl.load(offsets + token + 1, mask=known, other=0) - start > SEGMENT)


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_grad_long_segments_kernel(
    grad, sorted_ids, order, offsets, weights, partial, m, d, v, stride_n, stride_g,
    K: tl.constexpr, SEGMENT: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[tile, 0]: the tile's part of the long segment that holds its first entry; [tile, 1]: its last entry's."""
    tile = widen(tl.program_id(0), INT64)
    columns = widen(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    inside = columns < d
    begin = tile * SEGMENT
    end = tl.minimum(begin + SEGMENT, m)
    first, last = tl.load(sorted_ids + begin), tl.load(sorted_ids + end - 1)
    first_long = _is_long(offsets, first, v, SEGMENT)
    last_long = _is_long(offsets, last, v, SEGMENT) & (last != first)
    if first_long | last_long:
        head = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        tail = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i in tl.static_range(0, SEGMENT, BLOCK_M):
            entries = begin + i + tl.arange(0, BLOCK_M)
            token = tl.load(sorted_ids + entries, mask=entries < end, other=v)
            of_head = (token == first) & first_long & (entries < end)
            of_tail = (token == last) & last_long & (entries < end)
            used = (of_head | of_tail) != 0  # the interpreter of triton 3.9 has made integers of them
            entry = tl.load(order + entries, mask=used, other=0)
            weight = tl.load(weights + entry, mask=used, other=0.0).to(tl.float32)
            used = used & (weight != 0.0)
            where = grad + widen(entry // K, INT64)[:, None] * stride_n + columns[None, :] * stride_g
            g = tl.load(where, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
            g = tl.where(used[:, None], weight[:, None] * g, 0.0)
            head += tl.where(of_head[:, None], g, 0.0)
            tail += tl.where(of_tail[:, None], g, 0.0)
        tl.store(partial + tile * 2 * d + columns, tl.sum(head, axis=0), mask=inside)
        tl.store(partial + (tile * 2 + 1) * d + columns, tl.sum(tail, axis=0), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_grad_merge_kernel(
    sorted_ids, offsets, partial, out, m, d, v,
    SEGMENT: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tile in which a long segment begins adds up its parts, in order. There is one at most: it is the last."""
    tile = widen(tl.program_id(0), INT64)
    columns = widen(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    inside = columns < d
    begin = tile * SEGMENT
    first, last = tl.load(sorted_ids + begin), tl.load(sorted_ids + tl.minimum(begin + SEGMENT, m) - 1)
    if _is_long(offsets, last, v, SEGMENT):  # noqa: SIM102 (the second condition reads what the first allows)
        if tl.load(offsets + last) >= begin:
            slot = tl.where(first == last, 0, 1)
            total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            final = ((tl.load(offsets + last + 1) - 1) // SEGMENT).to(tl.int32)
            for i in range(tl.program_id(0) + 1, final + 1, BLOCK_M):
                tiles = widen(i + tl.arange(0, BLOCK_M), INT64)
                mask = (tiles <= final)[:, None] & inside[None, :]
                parts = tl.load(partial + tiles[:, None] * 2 * d + columns[None, :], mask=mask, other=0.0)
                total += parts
            total = tl.sum(total, axis=0) + tl.load(partial + (tile * 2 + slot) * d + columns, mask=inside, other=0.0)
            where = out + widen(last, INT64) * d + columns
            tl.store(where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "v", "padding_id"])
def mix_grad_atomic_kernel(
    grad, ids, weights, out, n, d, v, stride_n, stride_g, padding_id,
    K: tl.constexpr, INT64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = widen(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), INT64)
    columns = widen(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    mask = (rows < n)[:, None] & (columns < d)[None, :]
    g = tl.load(grad + rows[:, None] * stride_n + columns[None, :] * stride_g, mask=mask, other=0.0).to(tl.float32)
    for c in range(K):
        token = tl.load(ids + rows * K + c, mask=rows < n, other=-1)
        weight = tl.load(weights + rows * K + c, mask=rows < n, other=0.0).to(tl.float32)
        used = (token >= 0) & (token < v) & (token != padding_id) & (weight != 0.0)
        where = out + widen(token, INT64)[:, None] * d + columns[None, :]
        tl.atomic_add(where, weight[:, None] * g, mask=mask & used[:, None], sem="relaxed")


# Launchers. Without a padding id the kernels get one that no id is.

_NO_PADDING = -(2**63)


def _padding(padding_id: int | None) -> int:
    return _NO_PADDING if padding_id is None else padding_id


@launcher("ids", "weights")
def forward(embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None) -> Tensor:
    """ids and weights [n, K]; [n, d] in the table's dtype. An id out of range makes its position NaN."""
    (n, k), (v, d) = ids.shape, embedding.shape
    out = torch.empty(n, d, dtype=embedding.dtype, device=embedding.device)
    if n:
        launch(
            mix_forward_kernel,
            lambda meta: (ceil_div(n, meta["BLOCK_N"]), ceil_div(d, meta["BLOCK_D"])),
            width=d, int64_for=(embedding, out, ids),
            embedding=embedding, ids=ids, weights=weights, out=out, n=n, d=d, v=v,
            stride_v=embedding.stride(0), stride_d=embedding.stride(1), padding_id=_padding(padding_id), K=k,
        )  # fmt: skip
    return out


@launcher("ids", "weights")
def grad_weights(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None) -> Tensor:
    """grad [n, d], of any strides; [n, K] in the dtype of the weights."""
    (n, k), (v, d) = ids.shape, embedding.shape
    out = torch.empty_like(weights)
    if n:
        launch(
            mix_grad_weights_kernel,
            lambda meta: (ceil_div(n, meta["BLOCK_N"]),),
            width=d, int64_for=(embedding, grad, ids),
            grad=grad, embedding=embedding, ids=ids, out=out, n=n, d=d, v=v,
            stride_n=grad.stride(0), stride_g=grad.stride(1), stride_v=embedding.stride(0),
            stride_d=embedding.stride(1), padding_id=_padding(padding_id), K=k,
            BLOCK_C=min(4, next_power_of_2(k)),
        )  # fmt: skip
    return out


@launcher("ids", "weights")
def grad_embedding(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, deterministic: bool
) -> Tensor:
    """grad [n, d], of any strides; dense [v, d] in the table's dtype."""
    (n, k), (v, d) = ids.shape, embedding.shape
    if n == 0:
        return torch.zeros(v, d, dtype=embedding.dtype, device=embedding.device)
    if not deterministic:
        total = torch.zeros(v, d, dtype=torch.float32, device=embedding.device)
        launch(
            mix_grad_atomic_kernel,
            lambda meta: (ceil_div(n, meta["BLOCK_N"]), ceil_div(d, meta["BLOCK_D"])),
            width=d, int64_for=(total, grad, ids),
            grad=grad, ids=ids, weights=weights, out=total, n=n, d=d, v=v,
            stride_n=grad.stride(0), stride_g=grad.stride(1), padding_id=_padding(padding_id), K=k,
        )  # fmt: skip
        return total.to(embedding.dtype)
    m, device = n * k, ids.device
    keys = torch.empty(m, dtype=torch.int32, device=device)
    launch(
        mix_keys_kernel, lambda meta: (ceil_div(m, meta["BLOCK_M"]),), width=m, int64_for=(ids,),
        ids=ids, keys=keys, m=m, v=v, padding_id=_padding(padding_id),
    )  # fmt: skip
    sorted_ids, order = keys.sort(stable=True)
    offsets = torch.empty(v + 1, dtype=torch.int32 if m < 2**31 else torch.int64, device=device)
    launch(
        mix_offsets_kernel, lambda meta: (ceil_div(v + 1, meta["BLOCK_V"]),), width=v, int64_for=(ids,),
        sorted_ids=sorted_ids, offsets=offsets, m=m, v=v, halvings=m.bit_length(),
    )  # fmt: skip
    out = torch.empty(v, d, dtype=embedding.dtype, device=embedding.device)
    common: dict[str, Any] = {"grad": grad, "weights": weights, "d": d, "v": v, "K": k, "SEGMENT": SEGMENT,
              "stride_n": grad.stride(0), "stride_g": grad.stride(1)}  # fmt: skip
    launch(
        mix_grad_embedding_kernel,
        lambda meta: (ceil_div(v, meta["BLOCK_V"]), ceil_div(d, meta["BLOCK_D"])),
        width=d, int64_for=(out, grad, ids), order=order, offsets=offsets, out=out, **common,
    )  # fmt: skip
    if m > SEGMENT:
        tiles = ceil_div(m, SEGMENT)
        partial = torch.empty(tiles, 2, d, dtype=torch.float32, device=grad.device)
        launch(
            mix_grad_long_segments_kernel,
            lambda meta: (tiles, ceil_div(d, meta["BLOCK_D"])),
            width=d, int64_for=(partial, grad, ids),
            sorted_ids=sorted_ids, order=order, offsets=offsets, partial=partial, m=m, **common,
        )  # fmt: skip
        launch(
            mix_grad_merge_kernel,
            lambda meta: (tiles, ceil_div(d, meta["BLOCK_D"])),
            width=d, int64_for=(partial, out),
            sorted_ids=sorted_ids, offsets=offsets, partial=partial, out=out, m=m, d=d, v=v, SEGMENT=SEGMENT,
        )  # fmt: skip
    return out
