"""The decode step: sample, anchor, gate, weights, mix and record in two launches; two more where the sample is cut, and
one where a strategy mixes draws.

1. Partials: a program a row and a piece of the vocabulary reads its logits once and leaves their largest, the sum of
   exp(z - largest) and its first moment. How the vocabulary is cut depends on V alone, so a row's bits do not depend on
   its batch, for logits of the same strides and alignment, by which the compiler may order sums. Where the sample is
   cut, it also leaves how many groups of a few logits reach above each of some edges, and their mass.
2. Only with top-k, top-p or min-p: the edges tell above which of them the last logit that is kept lies. A program a row
   and a piece copies its groups that reach above it, in the order of their ids.
3. Only then: a program a row finds that last logit among the candidates. Between the smallest and the largest a few
   pivots are tried at a time, each with the count and the mass above it; the ends then move to logits that exist, so
   that the search ends with the exact one. It leaves what mass each piece keeps. Where the candidates are too many, it
   searches the row's logits instead.
4. Only for the strategies that mix draws: a program a draw.
5. Choice: a program a row merges the pieces, draws gate and sample from the row's counter, finds the piece in which the
   mass first exceeds u times the total (in float64), reads that piece again and finds the token; then the candidates,
   their weights, the mix and the record.

Exponentials are powers of two of (x - largest) times log2(e) / temperature, so a logit that is the largest weighs
exactly 1.

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
from .primitives import (
    LEAST_UNIT,
    LN_2,
    LOG2_E,
    ceil_div,
    exponentials,
    launch,
    launcher,
    merged,
    next_power_of_2,
    random_words,
    scale,
    widen,
)

PIVOTS = 4
EDGES, EDGE_STEP = 8, tl.constexpr(2.0)  # of a piece, below its largest logit and that far apart
SEARCHED = 32  # edges below the largest logit of a row: 64, beyond which a search takes the whole row
CANDIDATES = 16384  # at most, of a row

OF_THE_LIKELIEST = ("topk", "gumbel", "gaussian", "moi")  # strategies whose candidates are the k most likely tokens

# The bits of ngrpo_ops/ops/decode_step/faults.py.
_NOT_A_NUMBER, _NO_TOKEN, _NO_SUCH_CANDIDATE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _setting(value, row, PER_ROW: tl.constexpr, DTYPE: tl.constexpr):
    if PER_ROW:
        value = tl.load(value + row)
    return tl.full([], value, DTYPE)  # also of a number that triton has made a constant


@triton.jit
def _counter(value, IS_TENSOR: tl.constexpr):
    if IS_TENSOR:
        value = tl.load(value)
    return tl.full([], value, tl.int64)


@triton.jit
def _inverse(temperature):
    """1 / temperature in two parts, and log2(e) / temperature; of a greedy row as of 1."""
    t = tl.full([], temperature, tl.float32)
    t = tl.where(t == 0.0, 1.0, t)
    inverse = 1.0 / t
    residual = tl.fma(-inverse, t, 1.0) * inverse
    return inverse, residual, tl.fma(inverse, LOG2_E, residual * LOG2_E)


@triton.jit
def _load_logits(row_logits, columns, v, stride_v, INT64: tl.constexpr):
    where = row_logits + widen(columns, INT64) * stride_v
    return tl.load(where, mask=columns < v, other=float("-inf")).to(tl.float32)


# 1. Partials ------------------------------------------------------------------------------------------------------


@triton.jit
def _edge_number(top_x):
    """The number of the highest edge that is not above a largest logit. Far numbers are clamped, which stays true:
    nothing lies above the next edge, or above any edge that is searched."""
    number = tl.floor(top_x * (1 / EDGE_STEP))
    return tl.minimum(tl.maximum(number, -(2.0**20)), 2.0**20).to(tl.int32)


@triton.jit
def _edge(number):
    return number.to(tl.float32) * EDGE_STEP


@triton.jit
def decode_partials_kernel(
    logits, temperature, best_values, best_ids, mass, moment, edge_counts, edge_masses, v, splits, stride_b, stride_v,
    BEST: tl.constexpr, FILTER: tl.constexpr, PER_ROW_T: tl.constexpr, GROUP: tl.constexpr, EDGES: tl.constexpr,
    INT64: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, split = pid // splits, pid % splits
    row_logits = logits + widen(row, INT64) * stride_b
    # What a thread loads at once is a group: only the groups' largest logits are searched for the largest of all.
    groups = tl.arange(0, BLOCK_V // GROUP)
    members = tl.arange(0, GROUP)
    first = split * BLOCK_V
    x = _load_logits(row_logits, first + groups[:, None] * GROUP + members[None, :], v, stride_v, INT64)
    heads = tl.max(x, axis=1)
    top_x = tl.max(heads, axis=0)
    last, last_id = top_x, -1
    left = heads  # the largest of each group of what is not among the best yet
    for i in range(BEST):
        group = tl.min(tl.where(left == last, groups, BLOCK_V // GROUP), axis=0)
        columns = first + group * GROUP + members
        y = _load_logits(row_logits, columns, tl.minimum(v, first + BLOCK_V), stride_v, INT64)
        last_id = tl.min(tl.where((y == last) & (columns > last_id), columns, _NO_ID), axis=0)
        tl.store(best_values + pid * BEST + i, last)
        tl.store(best_ids + pid * BEST + i, last_id)
        if BEST > 1:
            after = (y < last) | ((y == last) & (columns > last_id))
            left = tl.where(groups == group, tl.max(tl.where(after, y, float("-inf")), axis=0), left)
            below = tl.max(left, axis=0)
            last_id = tl.where(below < last, -1, last_id)
            last = below
    _, _, slope = _inverse(_setting(temperature, row, PER_ROW_T, tl.float32))
    e, moments = exponentials(x, top_x, slope)
    group_masses = tl.sum(e, axis=1)
    tl.store(mass + pid, tl.sum(group_masses, axis=0))
    tl.store(moment + pid, tl.sum(moments) * LN_2)
    if FILTER:
        p = tl.arange(0, EDGES)
        edges = _edge(_edge_number(top_x) - p)
        above = heads[None, :] > edges[:, None]
        counts = tl.sum(above.to(tl.int32), axis=1)
        masses = tl.sum(tl.where(above, group_masses[None, :], 0.0), axis=1)
        # Of each group all but the largest may lie below the edge, each by next to nothing.
        masses -= counts.to(tl.float32) * ((GROUP - 1) * tl.exp2((edges - top_x) * slope))
        tl.store(edge_counts + pid * EDGES + p, counts)
        tl.store(edge_masses + pid * EDGES + p, masses)


# 2. and 3. Filters ------------------------------------------------------------------------------------------------


@triton.jit
def _cut_row(
    temperature, top_k, top_p, min_p, best_values, mass, edge_counts, edge_masses, row, v, splits,
    BEST: tl.constexpr, BLOCK_S: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr, HAS_M: tl.constexpr,
    PER_ROW_T: tl.constexpr, PER_ROW_K: tl.constexpr, PER_ROW_P: tl.constexpr, PER_ROW_M: tl.constexpr,
    GROUP: tl.constexpr, EDGES: tl.constexpr, SPLIT: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Largest logit and log2(e) / temperature of a row; its top-k, top-p and log2(min-p), each 0, 1 or -inf where it
    filters nothing; what mass each piece has. And the candidates for the last logit that is kept: all groups that reach
    above an edge, how many in each piece, and the edge. There are none where no edge is low enough."""
    _, _, slope = _inverse(_setting(temperature, row, PER_ROW_T, tl.float32))
    s = tl.arange(0, BLOCK_S)
    piece = row * splits + s
    tops_x = tl.load(best_values + piece * BEST, mask=s < splits, other=float("-inf"))
    masses = tl.load(mass + piece, mask=s < splits, other=0.0)
    top_x = tl.max(tops_x, axis=0)
    shares = tl.where(masses > 0.0, masses * tl.exp2((tops_x - top_x) * slope), 0.0)
    usable = (tl.sum(masses, axis=0) > 0.0) & (top_x < float("inf"))  # else nothing will be sampled
    k, share, least = 0, 1.0, float("-inf")
    if HAS_K:
        k = _setting(top_k, row, PER_ROW_K, tl.int64)
        k = tl.where(usable & (k >= 1) & (k < v), k, 0).to(tl.int32)
    if HAS_P:
        share = tl.where(usable, _setting(top_p, row, PER_ROW_P, tl.float32), 1.0)
    if HAS_M:
        least = tl.where(usable, tl.log2(_setting(min_p, row, PER_ROW_M, tl.float32)), float("-inf"))
    top_edge = _edge_number(top_x)
    steps_down = top_edge - _edge_number(tops_x)  # from the row's highest edge to the piece's
    j = tl.arange(0, SEARCHED)
    own = j[None, :] - steps_down[:, None]
    # Nothing of the piece lies above its own highest edge's successor. Below its lowest edge there is no less.
    where = piece[:, None] * EDGES + tl.minimum(own, EDGES - 1)
    there = (own >= 0) & (s < splits)[:, None]
    enough = j < 0
    if HAS_M:
        enough = (_edge(top_edge - j) - top_x) * slope < least
    if HAS_P:
        above = tl.load(edge_masses + where, mask=there, other=0.0) * tl.exp2((tops_x - top_x) * slope)[:, None]
        target = share * tl.sum(shares, axis=0) * 1.00001  # more than rounding can miss
        enough = tl.where(share < 1.0, tl.sum(above, axis=0) >= target, enough)
    if HAS_K:  # what top-p keeps is among what top-k keeps
        heads = tl.sum(tl.load(edge_counts + where, mask=there, other=0), axis=0)
        enough = tl.where(k > 0, heads >= k, enough)
    lowest = tl.min(tl.where(enough, j, SEARCHED), axis=0)
    own = tl.where(lowest < SEARCHED, lowest - steps_down, -1)
    there = (own >= 0) & (s < splits)
    listed = tl.load(edge_counts + piece * EDGES + tl.minimum(own, EDGES - 1), mask=there, other=0)
    listed = tl.where(there & (own >= EDGES), SPLIT // GROUP, listed)  # below the piece's edges: all of it
    return top_x, slope, k, share, least, shares, listed, _edge(top_edge - lowest)


@triton.jit(do_not_specialize=["top_k"])
def decode_gather_kernel(
    logits, temperature, top_k, top_p, min_p, best_values, mass, edge_counts, edge_masses, candidates, v, splits,
    stride_b, stride_v,
    BEST: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr,
    HAS_M: tl.constexpr, PER_ROW_T: tl.constexpr, PER_ROW_K: tl.constexpr, PER_ROW_P: tl.constexpr,
    PER_ROW_M: tl.constexpr, GROUP: tl.constexpr, EDGES: tl.constexpr, SEARCHED: tl.constexpr, CAPACITY: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, split = pid // splits, pid % splits
    _, _, _, _, _, _, listed, edge = _cut_row(
        temperature, top_k, top_p, min_p, best_values, mass, edge_counts, edge_masses, row, v, splits, BEST, BLOCK_S,
        HAS_K, HAS_P, HAS_M, PER_ROW_T, PER_ROW_K, PER_ROW_P, PER_ROW_M, GROUP, EDGES, SPLIT, SEARCHED,
    )  # fmt: skip
    s = tl.arange(0, BLOCK_S)
    count = tl.sum(tl.where(s == split, listed, 0), axis=0)
    before = tl.sum(tl.where(s < split, listed, 0), axis=0)
    if (count > 0) & (tl.sum(listed, axis=0) * GROUP <= CAPACITY):
        groups = tl.arange(0, SPLIT // GROUP)
        columns = split * SPLIT + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = _load_logits(logits + widen(row, INT64) * stride_b, columns, v, stride_v, INT64)
        mine = ((tl.max(x, axis=1) > edge) | (count == SPLIT // GROUP)).to(tl.int32)
        place = (before + tl.cumsum(mine, axis=0) - mine) * GROUP
        where = candidates + widen(row, INT64) * CAPACITY + place[:, None] + tl.arange(0, GROUP)[None, :]
        tl.store(where, x.to(candidates.dtype.element_ty), mask=(mine > 0)[:, None])


@triton.jit
def _last_kept(
    row_logits, smallest, largest, target, active, top_x, slope, v, stride_v,
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
            e = tl.exp2((x - top_x) * slope)
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


@triton.jit(do_not_specialize=["top_k"])
def decode_filter_kernel(
    logits, temperature, top_k, top_p, min_p, best_values, mass, edge_counts, edge_masses, candidates, kept_mass,
    ties_before, cuts, quotas, v, splits, stride_b, stride_v,
    BEST: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr,
    HAS_M: tl.constexpr, PER_ROW_T: tl.constexpr, PER_ROW_K: tl.constexpr, PER_ROW_P: tl.constexpr,
    PER_ROW_M: tl.constexpr, GROUP: tl.constexpr, EDGES: tl.constexpr, SEARCHED: tl.constexpr, CAPACITY: tl.constexpr,
    PIVOTS: tl.constexpr, INT64: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    top_x, slope, k, share, least, shares, listed, _ = _cut_row(
        temperature, top_k, top_p, min_p, best_values, mass, edge_counts, edge_masses, row, v, splits, BEST, BLOCK_S,
        HAS_K, HAS_P, HAS_M, PER_ROW_T, PER_ROW_K, PER_ROW_P, PER_ROW_M, GROUP, EDGES, SPLIT, SEARCHED,
    )  # fmt: skip
    # Where the candidates are, in the order of their ids, and where those of each piece begin.
    s = tl.arange(0, BLOCK_S)
    length = tl.sum(listed, axis=0) * GROUP
    few = (length > 0) & (length <= CAPACITY)
    source = candidates + widen(row, INT64) * CAPACITY if few else logits + widen(row, INT64) * stride_b
    stride = tl.where(few, 1, stride_v)
    begins = tl.where(few, (tl.cumsum(listed, axis=0) - listed) * GROUP, s * SPLIT)
    length = tl.where(few, length, v)
    cut = float("-inf")
    quota = v
    smallest = top_x
    if HAS_K or HAS_P:  # noqa: SIM102 (the first is the compiler's, the second the row's)
        if (k > 0) | (share < 1.0):
            for start in range(0, length, BLOCK_V):
                x = _load_logits(source, start + tl.arange(0, BLOCK_V), length, stride, INT64)
                smallest = tl.minimum(smallest, tl.min(tl.where(x == float("-inf"), top_x, x), axis=0))
    total = tl.sum(shares, axis=0)
    if HAS_K:
        found, count_above, mass_above = _last_kept(
            source, smallest, top_x, k, k > 0, top_x, slope, length, stride, False, INT64, PIVOTS, BLOCK_V
        )
        if k > 0:
            ties = 0
            for start in range(0, length, BLOCK_V):
                x = _load_logits(source, start + tl.arange(0, BLOCK_V), length, stride, INT64)
                ties += tl.sum((x == found).to(tl.int32), axis=0)
            cut = found
            quota = tl.minimum(k - count_above, ties)
            total = mass_above + quota * tl.exp2((found - top_x) * slope)
            smallest = found
    if HAS_P:
        found, count_above, mass_above = _last_kept(
            source, smallest, top_x, share * total, share < 1.0, top_x, slope, length, stride, True, INT64, PIVOTS,
            BLOCK_V,
        )  # fmt: skip
        if share < 1.0:
            # Of equal logits as many as begin below the target.
            each = tl.exp2((found - top_x) * slope)
            wanted = tl.minimum(tl.ceil(tl.div_rn(share * total - mass_above, each)), v * 1.0).to(tl.int32)
            wanted = tl.maximum(wanted, 1)
            # Beyond top-k's own share of them only by rounding.
            quota = tl.minimum(wanted, quota) if found == cut else wanted
            cut = found
    tl.store(cuts + row * 2, cut)
    tl.store(cuts + row * 2 + 1, least)
    tl.store(quotas + row, quota)
    # What each piece keeps, and how many logits equal to the cut came before it.
    tied_in = tl.zeros([BLOCK_S], tl.int32)
    if (k > 0) | (share < 1.0) | (least > float("-inf")):
        ends = tl.where(few, begins + listed * GROUP, begins + SPLIT)
        shares = tl.zeros([BLOCK_S], tl.float32)
        ties = 0
        for start in range(0, length, BLOCK_C):
            place = start + tl.arange(0, BLOCK_C)
            x = _load_logits(source, place, length, stride, INT64)
            e, tied = _kept(x, top_x, slope, cut, quota, least, ties)
            within = (place[None, :] >= begins[:, None]) & (place[None, :] < ends[:, None])
            shares += tl.sum(tl.where(within, e[None, :], 0.0), axis=1)
            tied_in += tl.sum(tl.where(within, tied[None, :], 0), axis=1)
            ties += tl.sum(tied, axis=0)
    tl.store(kept_mass + row * splits + s, shares, mask=s < splits)
    tl.store(ties_before + row * splits + s, tl.cumsum(tied_in, axis=0) - tied_in, mask=s < splits)


@triton.jit
def _kept(x, top_x, slope, cut, quota, least, ties):
    """exp(z - the row's largest) of what the filters keep, and which logits equal the cut; `ties` of those came
    before."""
    below = (x - top_x) * slope
    tied = (x == cut).to(tl.int32)
    # Beyond every quota where x is below the cut, below every one where it is above: one comparison is left.
    place = tl.where(x == cut, ties + tl.cumsum(tied, axis=0) - tied, tl.where(x > cut, -1, _NO_ID))
    return tl.where((place < quota) & (below >= least), tl.exp2(below), 0.0), tied


# 4. and 5. Draws and choice -----------------------------------------------------------------------------------------


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
def _shares(mass, kept_mass, tops_x, top_x, slope, piece, s, splits, FILTER: tl.constexpr):
    """The mass of each piece that can be drawn, as a multiple of exp(the row's largest)."""
    if FILTER:
        return tl.load(kept_mass + piece, mask=s < splits, other=0.0)
    masses = tl.load(mass + piece, mask=s < splits, other=0.0)
    return tl.where(tops_x == float("-inf"), 0.0, masses * tl.exp2((tops_x - top_x) * slope))


@triton.jit
def _draw(
    u, row_logits, shares, row, ties_before, cuts, quotas, top_x, slope, v, splits, stride_v,
    BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, FILTER: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """The token at which the mass, in id order, first exceeds u times the total: first its piece, then in it."""
    s = tl.arange(0, BLOCK_S)
    shares = shares.to(tl.float64)
    ends = tl.cumsum(shares, axis=0)
    target = u * tl.sum(shares, axis=0)
    chosen = tl.min(tl.where((ends > target) & (shares > 0.0), s, BLOCK_S), axis=0)
    chosen = tl.where(chosen < BLOCK_S, chosen, tl.max(tl.where(shares > 0.0, s, 0), axis=0))
    rest = (target - tl.sum(tl.where(s == chosen, ends - shares, 0.0), axis=0)).to(tl.float32)
    columns = chosen * SPLIT + tl.arange(0, SPLIT)
    y = _load_logits(row_logits, columns, v, stride_v, INT64)
    if FILTER:
        cut = tl.load(cuts + row * 2)
        least = tl.load(cuts + row * 2 + 1)
        quota = tl.load(quotas + row)
        ties = tl.load(ties_before + row * splits + chosen)
        e, _ = _kept(y, top_x, slope, cut, quota, least, ties)
    else:
        e = tl.exp2((y - top_x) * slope)
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
    _, _, slope = _inverse(_setting(temperature, row, PER_ROW_T, tl.float32))
    s = tl.arange(0, BLOCK_S)
    piece = row * splits + s
    tops_x = tl.load(best_values + piece * BEST, mask=s < splits, other=float("-inf"))
    top_x = tl.max(tops_x, axis=0)
    shares = _shares(mass, kept_mass, tops_x, top_x, slope, piece, s, splits, FILTER)
    token = _draw(
        _uniform(high, low), logits + widen(row, INT64) * stride_b, shares, row, ties_before, cuts, quotas, top_x,
        slope, v, splits, stride_v, BLOCK_S, SPLIT, FILTER, INT64,
    )  # fmt: skip
    tl.store(draws + pid, token)


@triton.jit(do_not_specialize=["seed", "step", "threshold_high", "threshold_low"])
def decode_choice_kernel(
    logits, embedding, neighbor_ids, temperature, mixing_temperature, seed, step, row_ids, enabled, threshold_high,
    threshold_low, entropy_threshold, noise_scale, moi_beta, draws, best_values, best_ids, mass, moment, kept_mass,
    ties_before, cuts, quotas,
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
    temperature = _setting(temperature, row, PER_ROW_T, tl.float32)
    inverse, residual, slope = _inverse(temperature)
    seed = _counter(seed, SEED_TENSOR)
    step = _counter(step + row * stride_s, STEP_TENSOR)
    row_id = tl.load(row_ids + row) if HAS_ROWS else row.to(tl.int64)

    # The distribution, from its pieces.
    s = tl.arange(0, BLOCK_S)
    piece = row * splits + s
    tops_x = tl.load(best_values + piece * BEST, mask=s < splits, other=float("-inf"))
    masses = tl.load(mass + piece, mask=s < splits, other=0.0)
    moments = tl.load(moment + piece, mask=s < splits, other=0.0)
    top_x, total, log_total, entropy = merged(tops_x, masses, moments, slope)
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
    x -= top_x
    z = scale(x, inverse, residual)
    if RELEASED:
        z = tl.where((c < K) & (missing == 0), tl.div_rn(tl.exp(z), total), float("-inf"))
    if GUMBEL:
        z = z - tl.log(-tl.log(noise_uniform(seed, step, row_id, c)))
    if HAS_MIXING_TEMPERATURE:
        inverse_m, residual_m, _ = _inverse(mixing_temperature)
        z = scale(z, inverse_m, residual_m) if GUMBEL else scale(x, inverse_m, residual_m)
    elif GUMBEL:
        z = scale(z, inverse, residual)
    weights = tl.exp(z - tl.max(z, axis=0))
    weights = tl.div_rn(weights, tl.broadcast_to(tl.sum(weights, axis=0), (BLOCK_K,)))  # exactly 1 where there is one
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
        threshold = (tl.full([], threshold_high, tl.int64) << 16) + threshold_low
        gate = (gate_word.to(tl.int64) < threshold) & (bad == 0)
        if HAS_ENABLED:
            gate = gate & (tl.load(enabled + row) != 0)
        if HAS_ENTROPY:
            gate = gate & (entropy >= entropy_threshold)
        token = emitted
        if MOI == 0 and MULTIPLEX == 0:  # noqa: SIM102 (theirs is the sample itself)
            if (gate == 0) & (bad == 0):
                token = greedy_token
                if temperature != 0.0:
                    shares = _shares(mass, kept_mass, tops_x, top_x, slope, piece, s, splits, FILTER)
                    token = _draw(
                        _uniform(high, low), row_logits, shares, row, ties_before, cuts, quotas, top_x, slope, v,
                        splits, stride_v, BLOCK_S, SPLIT, FILTER, INT64,
                    )  # fmt: skip
        chosen_x = tl.load(row_logits + widen(token, INT64) * stride_v).to(tl.float32)
        tl.store(logprobs + row, tl.where(bad, float("nan"), scale(chosen_x - top_x, inverse, residual) - log_total))
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
            size = tl.where(gate, noise_scale * unit * tl.sqrt_rn(squares / d), 0.0)
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

    def __init__(self, logits: Tensor, temperature: Tensor, best: int, filtered: bool) -> None:
        rows, v = logits.shape
        kernel = decode_partials_kernel
        config = configs.pinned(kernel.__name__, v, interpreted=primitives.interpreted(kernel))
        self.split: int = config.kwargs["BLOCK_V"]
        self.splits, self.best = ceil_div(v, self.split), best
        floats = primitives.aligned_rows(2 + best, rows * self.splits, logits.device)
        self.mass, self.moment, self.values = floats[0], floats[1], floats[2:]
        self.ids = torch.empty(rows * self.splits * best, dtype=torch.int32, device=logits.device)
        self.group = 16 // logits.element_size()
        self.edges: dict[str, Any] = dict.fromkeys(("edge_counts", "edge_masses"))
        if filtered:
            shape, device = (rows * self.splits, EDGES), logits.device
            self.edges["edge_counts"] = torch.empty(shape, dtype=torch.int32, device=device)
            self.edges["edge_masses"] = torch.empty(shape, dtype=torch.float32, device=device)
        t = _strided(temperature, rows)
        self.row_arguments: dict[str, Any] = {
            "logits": logits, "temperature": t, "v": v, "splits": self.splits, "stride_b": logits.stride(0),
            "stride_v": logits.stride(1), "PER_ROW_T": _per_row(t),
        }  # fmt: skip
        launch(
            kernel, lambda meta: (rows * self.splits,), width=v, int64_for=(logits,), **self.row_arguments,
            best_values=self.values, best_ids=self.ids, mass=self.mass, moment=self.moment, **self.edges, BEST=best,
            FILTER=filtered, GROUP=self.group, EDGES=EDGES,
        )  # fmt: skip

    @property
    def piece_arguments(self) -> dict[str, Any]:
        return {
            "best_values": self.values, "mass": self.mass, "BEST": self.best,
            "BLOCK_S": next_power_of_2(self.splits), "SPLIT": self.split,
        }  # fmt: skip


def _filter(logits: Tensor, settings: Any, partials: _Partials) -> dict[str, Any]:
    """The second and third launch, where there is a filter."""
    filters = settings.top_k, settings.top_p, settings.min_p
    if partials.edges["edge_counts"] is None:
        return dict.fromkeys(("kept_mass", "ties_before", "cuts", "quotas"))
    rows, v = logits.shape
    k, p, m = (_strided(setting, rows) for setting in filters)
    like = partials.mass
    kept: dict[str, Any] = {
        "kept_mass": torch.empty_like(like), "ties_before": torch.empty_like(like, dtype=torch.int32),
        "cuts": torch.empty(rows, 2, dtype=torch.float32, device=logits.device),
        "quotas": torch.empty(rows, dtype=torch.int32, device=logits.device),
    }  # fmt: skip
    capacity = min(CANDIDATES, partials.splits * partials.split)
    common: dict[str, Any] = {
        **partials.row_arguments, **partials.piece_arguments, **partials.edges, "top_k": k, "top_p": p, "min_p": m,
        "candidates": torch.empty(rows, capacity, dtype=logits.dtype, device=logits.device), "HAS_K": k is not None,
        "HAS_P": p is not None, "HAS_M": m is not None, "PER_ROW_K": _per_row(k), "PER_ROW_P": _per_row(p),
        "PER_ROW_M": _per_row(m), "GROUP": partials.group, "EDGES": EDGES, "SEARCHED": SEARCHED, "CAPACITY": capacity,
    }  # fmt: skip
    int64_for = (logits, common["candidates"])
    launch(decode_gather_kernel, lambda meta: (rows * partials.splits,), width=v, int64_for=int64_for, **common)
    launch(
        decode_filter_kernel, lambda meta: (rows,), width=v, int64_for=int64_for, **common, **kept, PIVOTS=PIVOTS
    )  # fmt: skip
    return kept


def _counter_arguments(settings: Any) -> dict[str, Any]:
    seed, step, row_ids = _number(settings.seed), _number(settings.step), settings.row_ids
    return {
        "seed": seed, "step": step, "stride_s": settings.step.stride(0) if settings.step.dim() else 0,
        "row_ids": None if row_ids is None else row_ids.contiguous(), "HAS_ROWS": row_ids is not None,
        "SEED_TENSOR": _per_row(seed), "STEP_TENSOR": _per_row(step),
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
    enabled, least_entropy = settings.enabled, settings.entropy_threshold
    threshold = round(settings.mixing_rate * 2**32)  # in two halves: a rate of 0.5 would not fit in 32 bits with a sign
    if embedding is None:
        d, stride_e, stride_d, enabled, least_entropy = 0, 0, 0, None, None
    else:
        d, stride_e, stride_d = embedding.shape[1], embedding.stride(0), embedding.stride(1)
    return {
        "embedding": embedding, "enabled": None if enabled is None else enabled.contiguous(),
        "threshold_high": threshold >> 16, "threshold_low": threshold & 0xFFFF,
        "entropy_threshold": 0.0 if least_entropy is None else least_entropy,
        "d": d, "stride_e": stride_e, "stride_d": stride_d, "SAMPLE": embedding is not None,
        "HAS_ENABLED": enabled is not None, "HAS_ENTROPY": least_entropy is not None,
    }  # fmt: skip


def _choose(logits: Tensor, embedding: Tensor | None, settings: Any, outputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """All launches of a step. ids, weights, entropy, fault; the outputs of a whole step are written where they are."""
    rows, k, strategy = logits.shape[0], settings.k, settings.strategy
    filtered = any(setting is not None for setting in (settings.top_k, settings.top_p, settings.min_p))
    partials = _Partials(logits, settings.temperature, k if strategy in OF_THE_LIKELIEST else 1, filtered)
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
        entropies=entropy, faults=fault, K=k, BLOCK_K=next_power_of_2(k), NEIGHBOR=neighbors is not None,
        GUMBEL=strategy == "gumbel", GAUSSIAN=strategy == "gaussian" and embedding is not None, MOI=strategy == "moi",
        MULTIPLEX=strategy == "multiplex", RELEASED=settings.variant == "released",
        HAS_MIXING_TEMPERATURE=tau is not None,
    )  # fmt: skip
    return ids, weights, entropy, fault


@launcher()
def mixing_candidates(logits: Tensor, settings: Any, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, k], weights [B, k], entropy [B] (or empty), fault [B]: two launches, two for filters, one for draws."""
    nothing: dict[str, Any] = dict.fromkeys(("token_ids", "gates", "embeddings", "logprobs"))
    ids, weights, entropy, fault = _choose(logits, None, settings, nothing)
    return ids, weights, entropy if return_entropy else entropy.new_empty(0), fault


@launcher()
def decode_step(
    logits: Tensor, embedding: Tensor, settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `ngrpo_ops.decode_step`, in their order: two launches, two for filters, one for draws."""
    rows = logits.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    gates = torch.empty(rows, dtype=torch.bool, device=logits.device)
    embeddings = torch.empty(rows, embedding.shape[1], dtype=embedding.dtype, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    outputs = {"token_ids": tokens, "gates": gates, "embeddings": embeddings, "logprobs": logprobs}
    ids, weights, entropy, fault = _choose(logits, embedding, settings, outputs)
    return tokens, gates, ids, weights, embeddings, logprobs, entropy, fault
