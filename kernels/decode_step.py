"""The decode step: sample, anchor, gate, weights, mix and record in two launches; one more where the sample is cut, and
where a strategy mixes draws.

1. Partials: a program a row and a piece of the vocabulary reads its logits once and leaves their largest, the sum of
   exp(z - largest) and its first moment. How the vocabulary is cut depends on V alone, so a row's bits do not depend on
   its batch, for logits of the same strides and alignment, by which the compiler may order sums.
2. Only with top-k, top-p or min-p: a program a row finds the last logit that is kept. Between the smallest and the
   largest candidate for it a few pivots are tried at a time, each with the count and the mass above it; the ends then
   move to logits that exist, so that the search ends with the exact one. It leaves what mass each piece keeps.
3. Only for the strategies that mix draws: a program a draw.
4. Choice: a program a row merges the pieces, draws gate and sample from the row's counter, finds the piece in which the
   mass first exceeds u times the total (in float64), reads that piece again and finds the token; then the candidates,
   their weights, the mix and the record.

Nothing is allocated but outputs and partials, whose shapes depend on those of the inputs alone, and the host waits for
nothing: `seed` and `step` may be tensors on the GPU, and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, primitives
from .gaussian_noise import add_squares, noise_uniform, normal
from .primitives import LEAST_UNIT, launch, launcher, random_words, scale, widen

PIVOTS = 4

OF_THE_LIKELIEST = ("topk", "gumbel", "gaussian", "moi")  # strategies whose candidates are the k most likely tokens

# The bits of ngrpo_ops/ops/decode_step/faults.py.
_NOT_A_NUMBER, _NO_TOKEN, _NO_SUCH_CANDIDATE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _setting(value, row, PER_ROW: tl.constexpr):
    if PER_ROW:
        value = tl.load(value + row)
    return tl.to_tensor(value)


@triton.jit
def _counter(value, IS_TENSOR: tl.constexpr):
    if IS_TENSOR:
        value = tl.load(value)
    return tl.to_tensor(value).to(tl.int64)


@triton.jit
def _inverse(temperature):
    """1 / temperature in two parts; of a greedy row, 0, as of 1."""
    t = tl.to_tensor(temperature).to(tl.float32)
    t = tl.where(t == 0.0, 1.0, t)
    inverse = 1.0 / t
    return inverse, tl.fma(-inverse, t, 1.0) * inverse


@triton.jit
def _load_logits(row_logits, columns, v, stride_v, INT64: tl.constexpr):
    where = row_logits + widen(columns, INT64) * stride_v
    return tl.load(where, mask=columns < v, other=float("-inf")).to(tl.float32)


# 1. Partials ------------------------------------------------------------------------------------------------------


@triton.jit
def decode_partials_kernel(
    logits, temperature, best_values, best_ids, mass, moment, v, splits, stride_b, stride_v,
    BEST: tl.constexpr, PER_ROW_T: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, split = pid // splits, pid % splits
    columns = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _load_logits(logits + widen(row, INT64) * stride_b, columns, v, stride_v, INT64)
    inverse, residual = _inverse(_setting(temperature, row, PER_ROW_T))
    top_x = tl.max(x, axis=0)
    last = top_x
    last_id = tl.min(tl.where((x == top_x) & (columns < v), columns, _NO_ID), axis=0)
    tl.store(best_values + pid * BEST, top_x)
    tl.store(best_ids + pid * BEST, last_id)
    for i in range(1, BEST):
        after = (columns < v) & ((x < last) | ((x == last) & (columns > last_id)))
        last = tl.max(tl.where(after, x, float("-inf")), axis=0)
        last_id = tl.min(tl.where(after & (x == last), columns, _NO_ID), axis=0)
        tl.store(best_values + pid * BEST + i, last)
        tl.store(best_ids + pid * BEST + i, last_id)
    # Nothing but -inf: any finite reference will do.
    below = scale(x, inverse, residual) - tl.where(top_x == float("-inf"), 0.0, scale(top_x, inverse, residual))
    e = tl.exp(below)
    tl.store(mass + pid, tl.sum(e, axis=0))  # NaN with NaN or +inf among the logits: inf - inf
    tl.store(moment + pid, tl.sum(e * tl.where(e > 0.0, below, 0.0), axis=0))


# 2. Filters -------------------------------------------------------------------------------------------------------


@triton.jit
def _last_kept(
    row_logits, smallest, largest, target, active, top, inverse, residual, v, stride_v,
    BY_MASS: tl.constexpr, INT64: tl.constexpr, PIVOTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The smallest logit above which there is less than `target` (tokens, or mass): the last one kept, in the order of
    falling logits. Also the count and the mass above it. `smallest` is where the search begins, and a logit itself."""
    first = tl.where(active, smallest, largest)
    last = largest
    count_above = 0
    mass_above = 0.0
    p = tl.arange(0, PIVOTS)
    while first < last:
        # The first pivot is the smallest candidate itself, so every round ends the search or moves past it.
        pivots = tl.where(p == 0, first, first + (last - first) * (p.to(tl.float32) / PIVOTS))
        pivots = tl.minimum(pivots, last)
        counts = tl.zeros([PIVOTS], tl.int32)
        masses = tl.zeros([PIVOTS], tl.float32)
        at_most = tl.full([PIVOTS], float("-inf"), tl.float32)  # the largest logit that is no more than the pivot
        beyond = tl.full([PIVOTS], float("inf"), tl.float32)  # the smallest that is more
        for start in range(0, v, BLOCK_V):
            x = _load_logits(row_logits, start + tl.arange(0, BLOCK_V), v, stride_v, INT64)
            e = tl.exp(scale(x, inverse, residual) - top)
            above = x[None, :] > pivots[:, None]
            counts += tl.sum(above.to(tl.int32), axis=1)
            masses += tl.sum(tl.where(above, e[None, :], 0.0), axis=1)
            at_most = tl.maximum(at_most, tl.max(tl.where(above, float("-inf"), x[None, :]), axis=1))
            beyond = tl.minimum(beyond, tl.min(tl.where(above, x[None, :], float("inf")), axis=1))
        less = masses < target if BY_MASS else counts < target
        found = tl.max(less.to(tl.int32), axis=0) > 0
        count_above = tl.where(found, tl.max(tl.where(less, counts, 0), axis=0), count_above)
        mass_above = tl.where(found, tl.max(tl.where(less, masses, 0.0), axis=0), mass_above)
        last = tl.minimum(last, tl.min(tl.where(less, at_most, float("inf")), axis=0))
        first = tl.maximum(first, tl.max(tl.where(less, float("-inf"), beyond), axis=0))
    return last, count_above, mass_above


@triton.jit
def decode_filter_kernel(
    logits, temperature, top_k, top_p, min_p, best_values, mass, kept_mass, ties_before, cuts, quotas, v, splits,
    stride_b, stride_v,
    BEST: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr,
    HAS_M: tl.constexpr, PER_ROW_T: tl.constexpr, PER_ROW_K: tl.constexpr, PER_ROW_P: tl.constexpr,
    PER_ROW_M: tl.constexpr, PIVOTS: tl.constexpr, INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_logits = logits + widen(row, INT64) * stride_b
    inverse, residual = _inverse(_setting(temperature, row, PER_ROW_T))
    s = tl.arange(0, BLOCK_S)
    tops_x = tl.load(best_values + (row * splits + s) * BEST, mask=s < splits, other=float("-inf"))
    masses = tl.load(mass + row * splits + s, mask=s < splits, other=0.0)
    largest = tl.max(tops_x, axis=0)
    usable = (tl.sum(masses, axis=0) > 0.0) & (largest < float("inf"))  # else nothing will be sampled
    top = tl.where(largest == float("-inf"), 0.0, scale(largest, inverse, residual))
    total = tl.sum(tl.where(masses > 0.0, masses * tl.exp(scale(tops_x, inverse, residual) - top), 0.0), axis=0)
    smallest = largest
    if HAS_K or HAS_P:  # noqa: SIM102 (the first is the compiler's, the second the row's)
        if usable:
            for start in range(0, v, BLOCK_V):
                x = _load_logits(row_logits, start + tl.arange(0, BLOCK_V), v, stride_v, INT64)
                smallest = tl.minimum(smallest, tl.min(tl.where(x == float("-inf"), largest, x), axis=0))
    cut = float("-inf")
    quota = v
    if HAS_K:
        k = _setting(top_k, row, PER_ROW_K).to(tl.int32)
        active = usable & (k >= 1) & (k < v)
        found, count_above, mass_above = _last_kept(
            row_logits, smallest, largest, k, active, top, inverse, residual, v, stride_v, False, INT64, PIVOTS, BLOCK_V
        )
        if active:
            ties = 0
            for start in range(0, v, BLOCK_V):
                x = _load_logits(row_logits, start + tl.arange(0, BLOCK_V), v, stride_v, INT64)
                ties += tl.sum((x == found).to(tl.int32), axis=0)
            cut = found
            quota = tl.minimum(k - count_above, ties)
            total = mass_above + quota * tl.exp(scale(found, inverse, residual) - top)
            smallest = found
    if HAS_P:
        share = _setting(top_p, row, PER_ROW_P).to(tl.float32)
        active = usable & (share < 1.0)
        found, count_above, mass_above = _last_kept(
            row_logits, smallest, largest, share * total, active, top, inverse, residual, v, stride_v, True, INT64,
            PIVOTS, BLOCK_V,
        )  # fmt: skip
        if active:
            # Of equal logits as many as begin below the target.
            each = tl.exp(scale(found, inverse, residual) - top)
            wanted = tl.minimum(tl.ceil((share * total - mass_above) / each), v * 1.0).to(tl.int32)
            wanted = tl.maximum(wanted, 1)
            # Beyond top-k's own share of them only by rounding.
            quota = tl.minimum(wanted, quota) if found == cut else wanted
            cut = found
    least = float("-inf")
    if HAS_M:
        least = tl.log(_setting(min_p, row, PER_ROW_M).to(tl.float32))
    tl.store(cuts + row * 2, cut)
    tl.store(cuts + row * 2 + 1, least)
    tl.store(quotas + row, quota)
    ties = 0
    for split in range(splits):
        columns = split * SPLIT + tl.arange(0, SPLIT)
        x = _load_logits(row_logits, columns, v, stride_v, INT64)
        split_top = tl.load(best_values + (row * splits + split) * BEST)
        e = _kept_mass(x, split_top, top, cut, quota, least, ties, inverse, residual)
        tl.store(kept_mass + row * splits + split, tl.sum(e, axis=0))
        tl.store(ties_before + row * splits + split, ties)
        ties += tl.sum((x == cut).to(tl.int32), axis=0)


@triton.jit
def _kept_mass(x, split_top, top, cut, quota, least, ties, inverse, residual):
    """exp(z - the piece's largest) of what the filters keep; `ties` logits equal to the cut came before the piece."""
    z = scale(x, inverse, residual)
    tied = (x == cut).to(tl.int32)
    # Beyond every quota where x is below the cut, below every one where it is above: one comparison is left.
    place = tl.where(x == cut, ties + tl.cumsum(tied, axis=0) - tied, tl.where(x > cut, -1, _NO_ID))
    reference = tl.where(split_top == float("-inf"), 0.0, scale(split_top, inverse, residual))
    e = tl.where(z - top >= least, tl.exp(z - reference), 0.0)
    return tl.where(place < quota, e, 0.0)


# 3. and 4. Draws and choice -----------------------------------------------------------------------------------------


@triton.jit
def _likeliest(best_values, best_ids, row, splits, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of the pieces' best the row's K best, equal ones by the lower id; where there are fewer, the first again."""
    c = tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)
    mask = (s < splits)[:, None] & (c < K)[None, :]
    where = (row * splits + s)[:, None] * K + c[None, :]
    values = tl.load(best_values + where, mask=mask, other=float("-inf"))
    tokens = tl.load(best_ids + where, mask=mask, other=_NO_ID)
    found = tl.zeros([BLOCK_K], tl.int32)
    missing = tl.zeros([BLOCK_K], tl.int32)
    last = float("inf")
    last_id = -1
    anchor = 0
    for i in range(K):
        after = (values < last) | ((values == last) & (tokens > last_id))
        last = tl.max(tl.max(tl.where(after, values, float("-inf")), axis=1), axis=0)
        last_id = tl.min(tl.min(tl.where(after & (values == last), tokens, _NO_ID), axis=1), axis=0)
        anchor = tl.where(i == 0, last_id, anchor)
        gone = (last == float("-inf")) & (i > 0)
        found = tl.where(c == i, tl.where(gone, anchor, last_id), found)
        missing = tl.where(c == tl.where(gone, i, -1), 1, missing)
    return found, missing


@triton.jit
def _mixed(embedding, ids, weights, columns, d, stride_v, stride_d, K: tl.constexpr, BLOCK_K: tl.constexpr,
           BLOCK_D: tl.constexpr, INT64: tl.constexpr):  # fmt: skip
    c = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(K):
        weight = tl.sum(tl.where(c == i, weights, 0.0), axis=0)
        token = tl.sum(tl.where(c == i, ids, 0), axis=0)
        where = embedding + widen(token, INT64) * stride_v + widen(columns, INT64) * stride_d
        end = tl.where(weight != 0.0, d, 0)  # a row of weight 0 is not read
        rows = tl.load(where, mask=columns < end, other=0.0).to(tl.float32)
        total += tl.where(weight != 0.0, weight * rows, 0.0)
    return total.to(embedding.dtype.element_ty).to(tl.float32)


@triton.jit
def _uniform(high, low):
    """float64 in [0, 1), from two words."""
    return ((high.to(tl.uint64) << 21) | (low.to(tl.uint64) >> 11)).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _draw(
    u, row_logits, masses, shrink, row, best_values, ties_before, cuts, quotas, top, inverse, residual, v, splits,
    stride_v,
    BEST: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, FILTER: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """The token at which the mass, in id order, first exceeds u times the total: first its piece, then in it."""
    s = tl.arange(0, BLOCK_S)
    shares = (masses * shrink).to(tl.float64)
    ends = tl.cumsum(shares, axis=0)
    target = u * tl.sum(shares, axis=0)
    chosen = tl.min(tl.where((ends > target) & (shares > 0.0), s, BLOCK_S), axis=0)
    chosen = tl.where(chosen < BLOCK_S, chosen, tl.max(tl.where(shares > 0.0, s, 0), axis=0))
    mine = s == chosen
    before = tl.sum(tl.where(mine, ends - shares, 0.0), axis=0)
    rest = ((target - before) / tl.sum(tl.where(mine, shrink, 0.0), axis=0).to(tl.float64)).to(tl.float32)
    columns = chosen * SPLIT + tl.arange(0, SPLIT)
    y = _load_logits(row_logits, columns, v, stride_v, INT64)
    split_top = tl.load(best_values + (row * splits + chosen) * BEST)
    if FILTER:
        cut = tl.load(cuts + row * 2)
        least = tl.load(cuts + row * 2 + 1)
        quota = tl.load(quotas + row)
        ties = tl.load(ties_before + row * splits + chosen)
        e = _kept_mass(y, split_top, top, cut, quota, least, ties, inverse, residual)
    else:
        e = tl.exp(scale(y, inverse, residual) - scale(split_top, inverse, residual))
    crossed = (tl.cumsum(e, axis=0) > rest) & (e > 0.0)
    token = tl.min(tl.where(crossed, columns, _NO_ID), axis=0)
    return tl.where(token == _NO_ID, tl.max(tl.where(e > 0.0, columns, 0), axis=0), token)


@triton.jit(do_not_specialize=["seed", "step"])
def decode_draws_kernel(
    logits, temperature, seed, step, row_ids, best_values, mass, kept_mass, ties_before, cuts, quotas, draws, v, splits,
    stride_b, stride_v, stride_s,
    DRAWS: tl.constexpr, BEST: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, FILTER: tl.constexpr,
    HAS_ROWS: tl.constexpr, PER_ROW_T: tl.constexpr, SEED_TENSOR: tl.constexpr, STEP_TENSOR: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """A draw of a row each: the first by the words of its sample, the others by the streams from 1 on, two words each.
    Rows without a distribution, and greedy ones, are looked after by who reads them."""
    pid = tl.program_id(0)
    row, i = pid // DRAWS, pid % DRAWS
    row_id = tl.load(row_ids + row) if HAS_ROWS else row.to(tl.int64)
    stream = ((i + 1) // 2).to(tl.int64)
    w0, w1, w2, w3 = random_words(
        _counter(seed, SEED_TENSOR), _counter(step + row * stride_s, STEP_TENSOR), row_id, stream
    )
    high = tl.where(i == 0, w1, tl.where(i % 2 == 1, w0, w2))
    low = tl.where(i == 0, w2, tl.where(i % 2 == 1, w1, w3))
    inverse, residual = _inverse(_setting(temperature, row, PER_ROW_T))
    s = tl.arange(0, BLOCK_S)
    piece = row * splits + s
    tops_x = tl.load(best_values + piece * BEST, mask=s < splits, other=float("-inf"))
    top_x = tl.max(tops_x, axis=0)
    top = tl.where(top_x == float("-inf"), 0.0, scale(top_x, inverse, residual))
    shrink = tl.exp(tl.where(tops_x == float("-inf"), 0.0, scale(tops_x, inverse, residual) - top))
    masses = tl.load((kept_mass if FILTER else mass) + piece, mask=s < splits, other=0.0)
    token = _draw(
        _uniform(high, low), logits + widen(row, INT64) * stride_b, masses, shrink, row, best_values, ties_before, cuts,
        quotas, top, inverse, residual, v, splits, stride_v, BEST, BLOCK_S, SPLIT, FILTER, INT64,
    )  # fmt: skip
    tl.store(draws + pid, token)


@triton.jit(do_not_specialize=["seed", "step", "threshold"])
def decode_choice_kernel(
    logits, embedding, neighbor_ids, temperature, mixing_temperature, seed, step, row_ids, enabled, threshold,
    entropy_threshold, noise_scale, moi_beta, draws, best_values, best_ids, mass, moment, kept_mass, ties_before, cuts,
    quotas,
    token_ids, gates, ids_out, weights_out, embeddings, logprobs, entropies, faults, v, d, splits,
    stride_b, stride_v, stride_e, stride_d, stride_n, stride_k, stride_s,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BEST: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
    NEIGHBOR: tl.constexpr, GUMBEL: tl.constexpr, GAUSSIAN: tl.constexpr, MOI: tl.constexpr, MULTIPLEX: tl.constexpr,
    RELEASED: tl.constexpr,
    SAMPLE: tl.constexpr, FILTER: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_ENABLED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_MIXING_TEMPERATURE: tl.constexpr, PER_ROW_T: tl.constexpr, SEED_TENSOR: tl.constexpr,
    STEP_TENSOR: tl.constexpr, INT64: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_logits = logits + widen(row, INT64) * stride_b
    temperature = _setting(temperature, row, PER_ROW_T)
    inverse, residual = _inverse(temperature)
    seed = _counter(seed, SEED_TENSOR)
    step = _counter(step + row * stride_s, STEP_TENSOR)
    row_id = tl.load(row_ids + row) if HAS_ROWS else row.to(tl.int64)

    # The distribution, from its pieces.
    s = tl.arange(0, BLOCK_S)
    piece = row * splits + s
    tops_x = tl.load(best_values + piece * BEST, mask=s < splits, other=float("-inf"))
    tops = scale(tops_x, inverse, residual)
    masses = tl.load(mass + piece, mask=s < splits, other=0.0)
    moments = tl.load(moment + piece, mask=s < splits, other=0.0)
    top_x = tl.max(tops_x, axis=0)
    top = tl.where(top_x == float("-inf"), 0.0, scale(top_x, inverse, residual))
    empty = tops_x == float("-inf")
    shift = tl.where(empty, 0.0, tops - top)
    shrink = tl.exp(shift)
    total = tl.sum(tl.where(empty & (masses == masses), 0.0, masses * shrink), axis=0)
    log_total = tl.log(total)
    entropy = log_total - tl.sum(tl.where(empty, 0.0, shrink * (moments + shift * masses)), axis=0) / total
    fault = tl.where(total != total, _NOT_A_NUMBER, tl.where(total == 0.0, _NO_TOKEN, 0))

    # Candidates, the first the anchor.
    c = tl.arange(0, BLOCK_K)
    missing = tl.zeros([BLOCK_K], tl.int32)
    if BEST > 1:
        ids, missing = _likeliest(best_values, best_ids, row, splits, K, BLOCK_K, BLOCK_S)
    else:
        firsts = tl.load(best_ids + piece, mask=s < splits, other=_NO_ID)
        anchor = tl.min(tl.where(tops_x == top_x, firsts, _NO_ID), axis=0)
        anchor = tl.where(fault == 0, anchor, 0)
        ids = tl.zeros([BLOCK_K], tl.int32) + anchor
        if NEIGHBOR:
            listed = neighbor_ids + widen(anchor, INT64) * stride_n + (c - 1) * stride_k
            neighbors = tl.load(listed, mask=(c >= 1) & (c < K), other=0)
            known = (neighbors >= 0) & (neighbors < v)
            outside = tl.max(((c >= 1) & (c < K) & (known == 0)).to(tl.int32), axis=0) > 0
            fault = tl.where((fault == 0) & outside, _NO_SUCH_CANDIDATE, fault)
            ids = tl.where((c >= 1) & known, neighbors.to(tl.int32), ids)
    ids = tl.where(c < tl.where(fault == 0, K, 0), ids, 0)
    greedy_token = tl.sum(tl.where(c == 0, ids, 0), axis=0)
    first = 0  # the place of the one that is emitted
    drawn = greedy_token
    usable = (fault == 0) & (temperature != 0.0)
    if MULTIPLEX:
        tokens = tl.load(draws + row * K + c, mask=c < K, other=0)
        ids = tl.where(usable, tokens, greedy_token)
        again = (ids[:, None] == ids[None, :]) & (c[None, :] < c[:, None])
        missing = tl.max(again.to(tl.int32), axis=1)
        drawn = tl.sum(tl.where(c == 0, ids, 0), axis=0)
    if MOI:
        drawn = tl.where(usable, tl.load(draws + row), greedy_token)
        # Among the likeliest, or instead of the last of them.
        first = tl.min(tl.where((ids == drawn) & (c < K) & (missing == 0), c, K - 1), axis=0)
        ids = tl.where(c == first, drawn, ids)
    x = tl.load(row_logits + widen(ids, INT64) * stride_v, mask=c < K, other=float("-inf")).to(tl.float32)
    x = tl.where(missing > 0, float("-inf"), x)
    z = scale(x, inverse, residual) - top
    if RELEASED:
        z = tl.where((c < K) & (missing == 0), tl.exp(z) / total, float("-inf"))
    if GUMBEL:
        z = z - tl.log(-tl.log(noise_uniform(seed, step, row_id, c)))
    if HAS_MIXING_TEMPERATURE:
        inverse_m, residual_m = _inverse(mixing_temperature)
        z = scale(z, inverse_m, residual_m) if GUMBEL else scale(x, inverse_m, residual_m)
    elif GUMBEL:
        z = scale(z, inverse, residual)
    weights = tl.exp(z - tl.max(z, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    if GUMBEL:  # the heaviest
        # Of a row at fault no weight is the largest. Its candidates stay within the row too.
        first = tl.min(tl.where((weights == tl.max(weights, axis=0)) & (c < K), c, K - 1), axis=0)
    if MOI:
        share = tl.where(v > 1, tl.maximum(entropy, 0.0) / tl.log(v * 1.0), 0.0)
        weights = (share * weights + tl.where(c == first, moi_beta + 1.0 - share, 0.0)) / (moi_beta + 1.0)
    emitted = tl.sum(tl.where(c == first, ids, 0), axis=0)
    place = tl.where(c == first, 0, tl.where(c < first, c + 1, c))  # the others keep their order
    bad = fault != 0
    tl.store(ids_out + row * K + place, ids.to(tl.int64), mask=c < K)
    tl.store(weights_out + row * K + place, tl.where(bad, float("nan"), weights), mask=c < K)
    tl.store(entropies + row, tl.where(bad, float("nan"), entropy))
    tl.store(faults + row, fault)

    if SAMPLE:
        gate_word, high, low, _ = random_words(seed, step, row_id, tl.zeros([], tl.int64))
        gate = (gate_word.to(tl.int64) < tl.to_tensor(threshold).to(tl.int64)) & (bad == 0)
        if HAS_ENABLED:
            gate = gate & (tl.load(enabled + row) != 0)
        if HAS_ENTROPY:
            gate = gate & (entropy >= entropy_threshold)
        token = emitted
        if MOI == 0 and MULTIPLEX == 0:  # noqa: SIM102 (theirs is the sample itself)
            if (gate == 0) & (bad == 0):
                token = greedy_token
                if temperature != 0.0:
                    if FILTER:
                        masses = tl.load(kept_mass + piece, mask=s < splits, other=0.0)
                    token = _draw(
                        _uniform(high, low), row_logits, masses, shrink, row, best_values, ties_before, cuts, quotas,
                        top, inverse, residual, v, splits, stride_v, BEST, BLOCK_S, SPLIT, FILTER, INT64,
                    )  # fmt: skip
        chosen_x = tl.load(row_logits + widen(token, INT64) * stride_v).to(tl.float32)
        tl.store(logprobs + row, tl.where(bad, float("nan"), scale(chosen_x, inverse, residual) - top - log_total))
        tl.store(token_ids + row, token.to(tl.int64))
        tl.store(gates + row, gate)

        # What is not mixed is a mix of the token alone.
        ids = tl.where(gate, ids, token)
        weights = tl.where(gate, weights, tl.where(c == 0, 1.0, 0.0))
        size = 0.0
        if GAUSSIAN:
            unit, squares = tl.full([], LEAST_UNIT, tl.float32), 0.0
            for start in range(0, d, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                value = _mixed(embedding, ids, weights, columns, d, stride_e, stride_d, K, BLOCK_K, BLOCK_D, INT64)
                unit, squares = add_squares(unit, squares, value)
            size = tl.where(gate, noise_scale * unit * tl.sqrt(squares / d), 0.0)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            value = _mixed(embedding, ids, weights, columns, d, stride_e, stride_d, K, BLOCK_K, BLOCK_D, INT64)
            if GAUSSIAN:
                value += tl.where(size > 0.0, size * normal(seed, step, row_id, columns), 0.0)
            value = tl.where(bad, float("nan"), value)
            where = embeddings + widen(row, INT64) * d + columns
            tl.store(where, value.to(embeddings.dtype.element_ty), mask=columns < d)


# Launchers --------------------------------------------------------------------------------------------------------
#
# `settings` is the `Settings` of ngrpo_ops/ops/decode_step/settings.py. This folder imports nothing of ngrpo_ops.


def _number(setting: Tensor) -> float | int | Tensor:
    """A 0-d tensor on the CPU is a number to the kernel. The kernel reads every other tensor itself."""
    return setting.item() if setting.dim() == 0 and setting.device.type == "cpu" else setting


def _strided(setting: Tensor | None, rows: int) -> Any:
    """A setting as the kernels take it: a number, or [B] contiguous."""
    if setting is None:
        return None
    value = _number(setting)
    return value.expand(rows).contiguous() if isinstance(value, Tensor) else value


def _per_row(value: Any) -> bool:
    return isinstance(value, Tensor)


class _Partials:
    """The first launch: what the others need of each row's pieces."""

    def __init__(self, logits: Tensor, temperature: Tensor, best: int) -> None:
        rows, v = logits.shape
        kernel = decode_partials_kernel
        config = configs.pinned(kernel.__name__, v, interpreted=primitives.interpreted(kernel))
        self.split: int = config.kwargs["BLOCK_V"]
        self.splits, self.best = triton.cdiv(v, self.split), best
        floats = torch.empty(2 + best, rows * self.splits, dtype=torch.float32, device=logits.device)
        self.mass, self.moment, self.values = floats[0], floats[1], floats[2:]
        self.ids = torch.empty(rows * self.splits * best, dtype=torch.int32, device=logits.device)
        t = _strided(temperature, rows)
        self.row_arguments: dict[str, Any] = {
            "logits": logits, "temperature": t, "v": v, "splits": self.splits, "stride_b": logits.stride(0),
            "stride_v": logits.stride(1), "PER_ROW_T": _per_row(t),
        }  # fmt: skip
        launch(
            kernel, lambda meta: (rows * self.splits,), width=v, int64_for=(logits,), **self.row_arguments,
            best_values=self.values, best_ids=self.ids, mass=self.mass, moment=self.moment, BEST=best,
        )  # fmt: skip

    @property
    def piece_arguments(self) -> dict[str, Any]:
        return {
            "best_values": self.values, "mass": self.mass, "BEST": self.best,
            "BLOCK_S": triton.next_power_of_2(self.splits), "SPLIT": self.split,
        }  # fmt: skip


def _filter(logits: Tensor, settings: Any, partials: _Partials) -> dict[str, Any]:
    """The second launch, where there is a filter."""
    filters = settings.top_k, settings.top_p, settings.min_p
    if all(setting is None for setting in filters):
        return dict.fromkeys(("kept_mass", "ties_before", "cuts", "quotas"))
    rows = logits.shape[0]
    k, p, m = (_strided(setting, rows) for setting in filters)
    like = partials.mass
    kept: dict[str, Any] = {
        "kept_mass": torch.empty_like(like), "ties_before": torch.empty_like(like, dtype=torch.int32),
        "cuts": torch.empty(rows, 2, dtype=torch.float32, device=logits.device),
        "quotas": torch.empty(rows, dtype=torch.int32, device=logits.device),
    }  # fmt: skip
    launch(
        decode_filter_kernel, lambda meta: (rows,), width=logits.shape[1], int64_for=(logits,),
        **partials.row_arguments, **partials.piece_arguments, **kept, top_k=k, top_p=p, min_p=m, HAS_K=k is not None,
        HAS_P=p is not None, HAS_M=m is not None, PER_ROW_K=_per_row(k), PER_ROW_P=_per_row(p), PER_ROW_M=_per_row(m),
        PIVOTS=PIVOTS,
    )  # fmt: skip
    return kept


def _counter_arguments(settings: Any) -> dict[str, Any]:
    seed, step, row_ids = settings.seed, settings.step, settings.row_ids
    return {
        "seed": _number(seed), "step": _number(step), "stride_s": step.stride(0) if step.dim() else 0,
        "row_ids": None if row_ids is None else row_ids.contiguous(), "HAS_ROWS": row_ids is not None,
        "SEED_TENSOR": _per_row(_number(seed)), "STEP_TENSOR": _per_row(_number(step)),
    }  # fmt: skip


def _draws(logits: Tensor, settings: Any, common: dict[str, Any]) -> Tensor | None:
    """The third launch, for the strategies that mix draws."""
    if settings.strategy not in ("moi", "multiplex"):
        return None
    rows, count = logits.shape[0], settings.k if settings.strategy == "multiplex" else 1
    draws = torch.empty(rows, count, dtype=torch.int32, device=logits.device)
    launch(
        decode_draws_kernel, lambda meta: (rows * count,), width=logits.shape[1], int64_for=(logits,), **common,
        draws=draws, DRAWS=count,
    )  # fmt: skip
    return draws


def _sampling_arguments(embedding: Tensor | None, settings: Any) -> dict[str, Any]:
    """What the choice reads of a whole step; without an embedding it only finds the candidates."""
    enabled, threshold = settings.enabled, settings.entropy_threshold
    if embedding is None:
        d, stride_e, stride_d, enabled, threshold = 0, 0, 0, None, None
    else:
        d, stride_e, stride_d = embedding.shape[1], embedding.stride(0), embedding.stride(1)
    return {
        "embedding": embedding, "enabled": None if enabled is None else enabled.contiguous(),
        "threshold": round(settings.mixing_rate * 2**32), "entropy_threshold": 0.0 if threshold is None else threshold,
        "d": d, "stride_e": stride_e, "stride_d": stride_d, "SAMPLE": embedding is not None,
        "HAS_ENABLED": enabled is not None, "HAS_ENTROPY": threshold is not None,
    }  # fmt: skip


def _choose(logits: Tensor, embedding: Tensor | None, settings: Any, outputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """All launches of a step. ids, weights, entropy, fault; the outputs of a whole step are written where they are."""
    rows, k, strategy = logits.shape[0], settings.k, settings.strategy
    partials = _Partials(logits, settings.temperature, k if strategy in OF_THE_LIKELIEST else 1)
    kept = _filter(logits, settings, partials)
    common = {
        **partials.row_arguments, **partials.piece_arguments, **kept, **_counter_arguments(settings),
        "FILTER": kept["cuts"] is not None,
    }  # fmt: skip
    draws = _draws(logits, settings, common)
    ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    entropy = torch.empty(rows, dtype=torch.float32, device=logits.device)
    fault = torch.empty(rows, dtype=torch.int32, device=logits.device)
    neighbors = settings.neighbor_ids if k > 1 else None
    option = settings.options[0] if settings.options else 0.0  # each of the strategies here has one at most
    tau = settings.mixing_temperature
    launch(
        decode_choice_kernel, lambda meta: (rows,), width=0 if embedding is None else embedding.shape[1],
        int64_for=(logits, embedding, neighbors, outputs.get("embeddings")), **common,
        **_sampling_arguments(embedding, settings), **outputs, neighbor_ids=neighbors,
        stride_n=0 if neighbors is None else neighbors.stride(0),
        stride_k=0 if neighbors is None else neighbors.stride(1), mixing_temperature=1.0 if tau is None else tau,
        moi_beta=option if strategy == "moi" else 0.0, noise_scale=option if strategy == "gaussian" else 0.0,
        draws=draws, best_ids=partials.ids, moment=partials.moment, ids_out=ids, weights_out=weights,
        entropies=entropy, faults=fault, K=k, BLOCK_K=triton.next_power_of_2(k), NEIGHBOR=neighbors is not None,
        GUMBEL=strategy == "gumbel", GAUSSIAN=strategy == "gaussian" and embedding is not None, MOI=strategy == "moi",
        MULTIPLEX=strategy == "multiplex", RELEASED=settings.variant == "released",
        HAS_MIXING_TEMPERATURE=tau is not None,
    )  # fmt: skip
    return ids, weights, entropy, fault


@launcher()
def mixing_candidates(logits: Tensor, settings: Any, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, k], weights [B, k], entropy [B] (or empty), fault [B]: two launches, one each for filters and draws."""
    nothing: dict[str, Any] = dict.fromkeys(("token_ids", "gates", "embeddings", "logprobs"))
    ids, weights, entropy, fault = _choose(logits, None, settings, nothing)
    return ids, weights, entropy if return_entropy else entropy.new_empty(0), fault


@launcher()
def decode_step(
    logits: Tensor, embedding: Tensor, settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `ngrpo_ops.decode_step`, in their order: two launches, one each for filters and draws."""
    rows = logits.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    gates = torch.empty(rows, dtype=torch.bool, device=logits.device)
    embeddings = torch.empty(rows, embedding.shape[1], dtype=embedding.dtype, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    outputs = {"token_ids": tokens, "gates": gates, "embeddings": embeddings, "logprobs": logprobs}
    ids, weights, entropy, fault = _choose(logits, embedding, settings, outputs)
    return tokens, gates, ids, weights, embeddings, logprobs, entropy, fault
