"""Breaks the kernels on purpose and expects the tests to notice: `make mutations`, or `python tests/mutations.py NAME`.

Each mutation is made in a copy of the checkout, and the tests of that operation are run there. A mutation that survives
is a hole in the tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    name: str
    module: str
    before: str
    after: str
    operation: str | None = None  # whose tests must notice; None: the module's


MUTATIONS = [
    # mix_embeddings: forward
    Mutation("forward: a zero weight is read", "mix_embeddings", "used = (weight != 0.0) & (token != padding_id)\n    known", "used = token != padding_id\n    known"),
    Mutation("forward: padding counts", "mix_embeddings", "(weight != 0.0) & (token != padding_id)\n    known", "(weight != 0.0)\n    known"),
    Mutation("forward: bad ids are not NaN", "mix_embeddings", 'tl.where(bad[:, None], float("nan"), total)', "total"),
    # gradient of the weights
    Mutation("grad weights: one block of columns", "mix_embeddings", "for start in range(0, d, BLOCK_D):", "for start in range(0, BLOCK_D, BLOCK_D):"),
    Mutation("grad weights: column stride", "mix_embeddings", "grad + rows[:, None] * stride_n + columns[None, :] * stride_g, mask=mask, other=0.0)\n            mask", "grad + rows[:, None] * stride_n + columns[None, :], mask=mask, other=0.0)\n            mask"),
    Mutation("grad weights: padding counts", "mix_embeddings", "used = (token >= 0) & (token < v) & (token != padding_id)\n        candidates", "used = (token >= 0) & (token < v)\n        candidates"),
    # gradient of the embedding
    Mutation("grad embedding: an entry late", "mix_embeddings", "more = i + ahead < length", "more = (i + ahead > 0) & (i + ahead < length)"),
    Mutation("grad embedding: segments of a tile", "mix_embeddings", "mine = live & (length <= SEGMENT)", "mine = live & (length < SEGMENT)"),
    Mutation("grad embedding: the position", "mix_embeddings", "where = grad + widen(entry // K, INT64)[:, None] * stride_n + columns[None, :] * stride_g\n            g = tl.load(where, mask=more[", "where = grad + widen(entry // (K + 1), INT64)[:, None] * stride_n + columns[None, :] * stride_g\n            g = tl.load(where, mask=more["),
    Mutation("long segments: the tail", "mix_embeddings", "tail += tl.where(of_tail[:, None], g, 0.0)", "tail += g"),
    Mutation("long segments: the last tile", "mix_embeddings", "range(tl.program_id(0) + 1, final + 1, BLOCK_M)", "range(tl.program_id(0) + 1, final, BLOCK_M)"),
    Mutation("long segments: the slot", "mix_embeddings", "slot = tl.where(first == last, 0, 1)", "slot = 1"),
    Mutation("grad embedding: padding counts", "mix_embeddings", "used = (token >= 0) & (token < v) & (token != padding_id)\n    tl.store(keys", "used = (token >= 0) & (token < v)\n    tl.store(keys"),
    Mutation("grad embedding: a segment's end", "mix_embeddings", "mask=low < high, other=0) < tokens", "mask=low < high, other=0) <= tokens"),
    Mutation("grad weights: unused candidates of an infinite gradient", "mix_embeddings", "tl.where(used, tl.sum(products, axis=2), 0.0)", "tl.sum(products, axis=2)"),
    Mutation("grad weights: the first candidates alone", "mix_embeddings", "for first in range(0, K, BLOCK_C):", "for first in range(0, BLOCK_C, BLOCK_C):"),
    Mutation("atomic: overwrites", "mix_embeddings", 'tl.atomic_add(where, weight[:, None] * g, mask=mask & used[:, None], sem="relaxed")', "tl.store(where, weight[:, None] * g, mask=mask & used[:, None])"),
    # selective_log_softmax
    Mutation("forward: no rescaling", "primitives", "shrink = tl.exp2(shift)", "shrink = tl.where(empty, 0.0, 1.0)", "selective_log_softmax"),
    Mutation("forward: entropy not shifted", "primitives", "moments += shift * LN_2 * masses", "moments += 0.0 * masses", "selective_log_softmax"),
    Mutation("forward: slices", "selective_log_softmax", "where = logits + (row // t) * stride_b + (row % t) * stride_t + widen(columns", "where = logits + row * stride_t + widen(columns"),
    Mutation("forward: -inf first", "primitives", 'tl.where(top_x == float("-inf"), 0.0, top_x)) * slope', "top_x) * slope", "selective_log_softmax"),
    Mutation("forward: 0 times -inf", "primitives", "e * tl.maximum(below, -200.0)", "e * below", "selective_log_softmax"),
    Mutation("backward: the entropy's own slope", "selective_log_softmax", "value = e * (of_p * share) - e_log_e * (grad_h * LN_2 * share)", "value = e * (of_p * share)"),
    Mutation("backward: repeated ids", "selective_log_softmax", "value += tl.where(columns == chosen, tl.load(grad + row * K + i) * inverse, 0.0)", "value = tl.where(columns == chosen, tl.load(grad + row * K + i) * inverse, value)"),
    Mutation("backward: temperature", "selective_log_softmax", "share = inverse / total", "share = 1.0 / total"),
    Mutation("backward: ids of other tiles", "selective_log_softmax", "if tl.max(((token >= first) & (token < first + BLOCK_V)).to(tl.int32), axis=0) > 0:", "if tl.min(((token >= first) & (token < first + BLOCK_V)).to(tl.int32), axis=0) > 0:"),
    # group_advantages
    Mutation("advantages: one-pass variance", "group_advantages", "squares += tl.sum(tl.where(w != 0.0, w * centered * centered, 0.0), axis=1)", "squares += tl.sum(w * x * x, axis=1) - weight * (max_reward + shifted_mean) * (max_reward + shifted_mean)"),
    Mutation("advantages: ddof", "group_advantages", "tl.sqrt_rn(tl.div_rn(squares, tl.maximum(weight - ddof, 1.0)))", "tl.sqrt_rn(tl.div_rn(squares, tl.maximum(weight, 1.0)))"),
    Mutation("advantages: singleton groups", "group_advantages", "divisor = tl.where(members > 1, divisor, 0.0)", "divisor = divisor"),
    Mutation("advantages: masked rows count", "group_advantages", "return rows, live, tl.where(w != 0.0, x, 0.0), w", "return rows, live, x, tl.where(live, 1.0, 0.0)"),
    Mutation("advantages backward: no centering", "group_advantages", "shared -= direct_sum / tl.maximum(weight, 1.0)", "shared -= 0.0 * direct_sum"),
    Mutation("advantages backward: no deviation", "group_advantages", "value += w * deviations * slope[:, None]", "value += 0.0 * w * deviations"),
    Mutation("advantages backward: the scale's gradient", "group_advantages", "grad_scale = grad_divisor + tl.load(grad_scales + group * columns + column, mask=group < groups, other=0.0)", "grad_scale = grad_divisor"),
    # nearest_neighbors
    Mutation("tile: the last columns", "nearest_neighbors", "for _ in range(0, d, BLOCK_K):", "for _ in range(0, d - BLOCK_K, BLOCK_K):"),
    Mutation("tile: the last group of tiles", "nearest_neighbors", "rows = tl.minimum(n_m - group * GROUP_M, GROUP_M)", "rows = GROUP_M"),
    Mutation("tile: l1's last column", "nearest_neighbors", "for k in range(d):", "for k in range(d - 1):"),
    Mutation("tile: l1 as a sum", "nearest_neighbors", "scores -= tl.abs(", "scores += tl.abs("),
    Mutation("append: strictly above", "nearest_neighbors", "x_takes = found & (score >= tl.load(x_thresholds", "x_takes = found & (score > tl.load(x_thresholds"),
    Mutation("append: no second round", "nearest_neighbors", 'more = tl.max(left) > float("-inf")', "more = False"),
    Mutation("append: only above the higher threshold", "nearest_neighbors", "least = tl.minimum(least, of_y)", "least = tl.maximum(least, of_y)"),
    Mutation("append: past the end", "nearest_neighbors", 'found = (score > float("-inf")) & (m < q) & (n < c)', 'found = (score > float("-inf")) & (m < q)'),
    Mutation("append: the column of a group", "nearest_neighbors", "(inside // 2) * 8 + inside % 2", "inside"),
    Mutation("append: the row itself", "nearest_neighbors", "x_takes = x_takes & (n != tl.load(excluded + m, mask=x_takes, other=-1))", "x_takes = x_takes"),
    Mutation("append: candidates that are not allowed", "nearest_neighbors", "y_takes = y_takes & (tl.load(x_allowed + m, mask=y_takes, other=0) != 0)", "y_takes = y_takes"),
    Mutation("append: past the places of a query", "nearest_neighbors", "room = takes & (at < capacity)", "room = takes & (at <= capacity)"),
    Mutation("append: the diagonal", "nearest_neighbors", "tile = tl.where(n[None, :] > m[:, None], tile", "tile = tl.where(n[None, :] >= m[:, None], tile"),
    Mutation("append: ids of the other side", "nearest_neighbors", "column = n + y_id if", "column = n + x_id if"),
    Mutation("append: all in one place", "nearest_neighbors", "tl.full(query.shape, 1, tl.int32), mask=takes", "tl.full(query.shape, 0, tl.int32), mask=takes"),
    Mutation("append: in the places of the other", "nearest_neighbors", "place = widen(query, INT64) * capacity + at", "place = widen(candidate, INT64) * capacity + at"),
    Mutation("append: a tile too many left out", "nearest_neighbors", "tile_n * BLOCK_N + BLOCK_N - 1 <= tile_m * BLOCK_M:", "tile_n * BLOCK_N <= tile_m * BLOCK_M:"),
    Mutation("keep best: equal scores by the higher column", "nearest_neighbors", "(rising.to(tl.int64) << 32) - column.to(tl.int64)", "(rising.to(tl.int64) << 32) + column.to(tl.int64)"),
    Mutation("keep best: negative scores the other way round", "nearest_neighbors", "rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)", "rising = bits"),
    Mutation("keep best: -0.0 below 0.0", "nearest_neighbors", "bits = (score + 0.0).to(tl.int32, bitcast=True)", "bits = score.to(tl.int32, bitcast=True)"),
    Mutation("keep best: the last places", "nearest_neighbors", "tl.minimum(tl.max(count), capacity), BLOCK_J):", "tl.minimum(tl.max(count), capacity) - BLOCK_J, BLOCK_J):"),
    Mutation("keep best: places that are empty", "nearest_neighbors", "other_is_there[:, None, :] & (other_key", "(other_key"),
    Mutation("keep best: no error", "nearest_neighbors", "tl.where(is_there, upper - error,", "tl.where(is_there, upper,"),
    Mutation("keep best: no roundoff of the column", "nearest_neighbors", "1.01 * (x_roundoff + y_roundoff)", "1.01 * x_roundoff"),
    Mutation("keep best: l1's scores as bounds", "nearest_neighbors", "upper = score * (1.0 - rounding)", "upper = score"),
    Mutation("keep best: l2's error not doubled", "nearest_neighbors", "error = 2.0 * error + rounding", "error = error + rounding"),
    Mutation("keep best: fewer than k pairs", "nearest_neighbors", 'tl.where(held < k, float("-inf"), least_of_k)', "least_of_k"),
    Mutation("keep best: fewer than are kept", "nearest_neighbors", 'tl.where(held < kept, float("-inf"), last)', "last"),
    Mutation("keep best: a threshold falls", "nearest_neighbors", "threshold = tl.maximum(tl.load(thresholds + row, mask=live, other=0.0), last)", "threshold = last"),
    Mutation("keep best: far too early", "nearest_neighbors", "far = new_kth > last_upper", "far = new_kth >= last_upper - 1.0"),
    Mutation("keep best: a pair at the threshold", "nearest_neighbors", "is_there & (upper >= threshold[:, None])", "is_there & (upper > threshold[:, None])"),
    Mutation("keep best: a lost query's pairs twice", "nearest_neighbors", " & ~is_lost[:, None]  # two", "  # two"),
    Mutation("keep best: a lost query goes on", "nearest_neighbors", 'tl.where(is_lost, float("inf"), threshold)', "threshold"),
    Mutation("pair scores: no pair", "nearest_neighbors", 'tl.where(is_pair, tl.sum(total, axis=1), float("-inf"))', "tl.sum(total, axis=1)"),
    Mutation("pair scores: column stride", "nearest_neighbors", "widen(k, INT64)[None, :] * y_d", "widen(k, INT64)[None, :]"),
    Mutation("pair scores: a scale", "nearest_neighbors", "(a * x_scale) * (b * y_scale)", "(a * x_scale) * b"),
    Mutation("pair scores: one block of columns", "nearest_neighbors", "for start in range(0, d, BLOCK_D):", "for start in range(0, BLOCK_D, BLOCK_D):"),
    # nearest_neighbors_few
    Mutation("few: no roundoff of the rows", "nearest_neighbors_few", "(1.01 * roundoff * norm)[:, None]", "(0.0 * roundoff * norm)[:, None]"),
    Mutation("few: no roundoff of the queries", "nearest_neighbors_few", "(rounding + 1.01 * x_roundoff)", "(rounding + 0.0 * x_roundoff)"),
    Mutation("few: no rounding", "nearest_neighbors_few", "(rounding + 1.01 * x_roundoff)", "(1.01 * x_roundoff)"),
    Mutation("few: the extra columns count", "nearest_neighbors_few", "live[:, None] & (k < d)[None, :], y_n", "live[:, None], y_n"),
    Mutation("few: squares of one block", "nearest_neighbors_few", "        squares += value * value", "        squares = value * value"),
    Mutation("few: errors of one block", "nearest_neighbors_few", "        errors += (value", "        errors = (value"),
    Mutation("few: tiny rows are ordinary", "nearest_neighbors_few", "((square < _LEAST_SQUARE) | (square > _MOST_SQUARE))", "(square > _MOST_SQUARE)"),
    Mutation("few: huge rows are ordinary", "nearest_neighbors_few", "((square < _LEAST_SQUARE) | (square > _MOST_SQUARE))", "(square < _LEAST_SQUARE)"),
    Mutation("few: zero rows are extreme", "nearest_neighbors_few", "(largest > 0) & (", "("),
    Mutation("few: NaN is finite", "nearest_neighbors_few", "tl.where(largest < 0x7F800000, state", "tl.where(largest <= 0x7FFFFFFF, state"),
    Mutation("few: products that are not normalized", "nearest_neighbors_few", "divisor)[:, None]\n", "tl.full((BLOCK_N,), 1.0, tl.float32))[:, None]\n"),
    Mutation("few: lengths are not given up", "nearest_neighbors_few", "(1.0 - rounding) * lengths", "lengths"),
    Mutation("few: the error of l2 once", "nearest_neighbors_few", "(2.0 * (of_query + of_row)", "(1.0 * (of_query + of_row)"),
    Mutation("few: rows that are not there", "nearest_neighbors_few", "mask=live[:, None] & asked[None, :])", "mask=asked[None, :])"),
    # nearest_neighbors_rows
    Mutation("statistics: no unit", "nearest_neighbors_rows", "unit = power_of_two(largest.to(tl.float32, bitcast=True))", "unit = power_of_two(tl.full((BLOCK_N,), 1.0, tl.float32))"),
    Mutation("statistics: one block of columns", "nearest_neighbors_rows", "        squares += value * value", "        squares = value * value"),
    Mutation("statistics: an approximate inverse", "nearest_neighbors_rows", "tl.div_rn(tl.full((BLOCK_N,), 1.0, tl.float32), tl.where(zero, 1.0, norm))", "(1.0 + 1e-7) / tl.where(zero, 1.0, norm)"),
    Mutation("statistics: NaN is finite", "nearest_neighbors_rows", "largest < 0x7F800000", "largest != 0x7F800000"),
    Mutation("statistics: the sign counts", "nearest_neighbors_rows", "& 0x7FFFFFFF)  # in", "& -1)  # in"),
    Mutation("statistics: roundoff in units", "nearest_neighbors_rows", "tl.div_rn(roundoff, tl.where(length > 0.0, length, 1.0))", "roundoff"),
    Mutation("prepared: ties away from zero", "nearest_neighbors_rows", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000"),
    Mutation("prepared: cut", "nearest_neighbors_rows", "bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000", "bits = bits & -0x10000"),
    Mutation("prepared: subnormal numbers", "nearest_neighbors_rows", "tl.where((bits & 0x7F800000) == 0, 0.0, bits.to(tl.float32, bitcast=True))", "bits.to(tl.float32, bitcast=True)"),
    Mutation("prepared: extra columns rounded down", "nearest_neighbors_rows", "(x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000", "x.to(tl.int32, bitcast=True) & -0x10000"),
    Mutation("prepared: extra columns that are flushed", "nearest_neighbors_rows", "tl.maximum(bits.to(tl.float32, bitcast=True), _LEAST_NORMAL)", "bits.to(tl.float32, bitcast=True)"),
    Mutation("prepared: the slice's first row", "nearest_neighbors_rows", "row = m + first if rows is None", "row = m if rows is None"),
    Mutation("prepared: a zero row's norm", "nearest_neighbors_rows", "norm = tl.where(inverse_norm > 0.0, 1.0, 0.0)", "norm = tl.where(inverse_norm >= 0.0, 1.0, 0.0)"),
    Mutation("prepared: no roundoff of the query", "nearest_neighbors_rows", "product(roundoff + rounding, norm)", "product(tl.zeros_like(norm) + rounding, norm)"),
    Mutation("prepared: no roundoff of the column", "nearest_neighbors_rows", "extra_1 = roundoff * norm", "extra_1 = 0.0 * norm"),
    Mutation("prepared: no rounding", "nearest_neighbors_rows", "product(roundoff + rounding, norm)", "product(roundoff, norm)"),
    Mutation("prepared: queries of l2 are not doubled", "nearest_neighbors_rows", "value *= 2.0", "value *= 1.0"),
    Mutation("prepared: a square of two numbers", "nearest_neighbors_rows", "tl.where(i == SQUARE + 2, low[:, None], extra)", "tl.where(i == SQUARE + 2, 0.0, extra)"),
    Mutation("prepared: the padding", "nearest_neighbors_rows", "live[:, None] & (d + i < w)", "live[:, None] & (d + i < w - 1)"),
    Mutation("movements: the old row's scale", "nearest_neighbors_rows", "tl.broadcast_to(old_scale, (BLOCK_N, BLOCK_D))", "tl.broadcast_to(new_scale, (BLOCK_N, BLOCK_D))"),
    Mutation("movements: l1 squared", "nearest_neighbors_rows", "total += tl.abs(b - a)", "total += (b - a) * (b - a)"),
    Mutation("movements: column stride", "nearest_neighbors_rows", "old_m, old_d, INT64)", "old_m, new_d, INT64)"),
    Mutation("partials: an anchor past the end", "decode_step", "(y == last) & (columns > last_id), columns, _NO_ID)", "(y == last) & (columns > last_id), columns + 1, _NO_ID)"),
    Mutation("partials: the next best is the same", "decode_step", "after = (y < last) | ((y == last) & (columns > last_id))", "after = (y < last) | (y == last)"),
    Mutation("choice: NaN is overlooked", "decode_step", "tl.where(total != total, _NOT_A_NUMBER,", "tl.where(total < 0.0, _NOT_A_NUMBER,"),
    Mutation("gather: the place of the pieces before", "decode_step", "place = (before + tl.cumsum(mine, axis=0) - mine) * GROUP", "place = (tl.cumsum(mine, axis=0) - mine) * GROUP"),
    Mutation("gather: an edge too high", "decode_step", "tl.max(x, axis=1) > edge)", "tl.max(x, axis=1) > edge + EDGE_STEP)"),
    Mutation("gather: a piece below its edges", "decode_step", "tl.where(there & (own >= EDGES), SPLIT // GROUP, listed)", "listed"),
    Mutation("gather: one candidate too few", "decode_step", "heads >= k, enough", "heads >= k - 1, enough"),
    Mutation("gather: top-p from half of it", "decode_step", "target = share * tl.sum(shares, axis=0) * 1.00001", "target = share * tl.sum(shares, axis=0) * 0.5"),
    Mutation("filter: more candidates than there is room", "decode_step", "few = (length > 0) & (length <= CAPACITY)", "few = length > 0"),
    Mutation("filter: ties of the cut", "decode_step", "ties + tl.cumsum(tied, axis=0) - tied, tl.where(x > cut", "ties + tl.cumsum(tied, axis=0), tl.where(x > cut"),
    Mutation("filter: ties of earlier pieces", "decode_step", "tl.cumsum(tied_in, axis=0) - tied_in", "tl.cumsum(tied_in, axis=0) * 0"),
    Mutation("filter: top-p of everything", "decode_step", "total = mass_above + quota * tl.exp2((found - top_x) * slope)", "total = total"),
    Mutation("filter: one token too few", "decode_step", "tl.ceil(tl.div_rn(share * total - mass_above, each))", "tl.floor(tl.div_rn(share * total - mass_above, each))"),
    Mutation("filter: min-p of the temperature 1", "decode_step", "(below >= least)", "(x - top_x >= least)"),
    Mutation("choice: pieces not rescaled", "decode_step", "masses * tl.exp2((tops_x - top_x) * slope))\n\n\n@triton.jit\ndef _draw", "masses)\n\n\n@triton.jit\ndef _draw"),
    Mutation("choice: rest of the piece not rescaled", "decode_step", "e = tl.exp2((y - top_x) * slope)\n", "e = tl.exp2((y - tl.max(y, axis=0)) * slope)\n"),
    Mutation("choice: the first of the piece", "decode_step", "crossed = (tl.cumsum(e, axis=0) > rest) & (e > 0.0)", "crossed = e > 0.0"),
    Mutation("choice: the entropy of the pieces", "primitives", "log_total - tl.sum(tl.where(empty, 0.0, shrink * moments), axis=0) / total", "log_total", "decode_step"),
    Mutation("choice: greedy rows are sampled", "decode_step", "if temperature != 0.0:", "if temperature != -1.0:"),
    Mutation("choice: rows switched off", "decode_step", "gate = gate & (tl.load(enabled + row) != 0)", "gate = gate & (tl.load(enabled + row) >= 0)"),
    Mutation("choice: a faulty row is mixed", "decode_step", "gate = (gate_word.to(tl.int64) < threshold) & (bad == 0)", "gate = gate_word.to(tl.int64) < threshold"),
    Mutation("choice: neighbors outside the vocabulary", "decode_step", "known = (neighbors >= 0) & (neighbors < v)", "known = neighbors >= 0"),
    Mutation("choice: candidates that are not there", "decode_step", 'x = tl.where(missing > 0, float("-inf"), x)', "x = x"),
    Mutation("choice: the emitted one is not first", "decode_step", "place = tl.where(c == first, 0, tl.where(c < first, c + 1, c))", "place = c"),
    Mutation("draws of moi: a sample that is not among the likeliest", "decode_step", "& (missing == 0), c, K - 1), axis=0)", "& (missing == 0), c, 0), axis=0)"),
    Mutation("draws of moi: beta", "decode_step", "moi_beta + 1.0 - share, 0.0)) / (moi_beta + 1.0)", "moi_beta + 1.0 - share, 0.0)) / 2.0"),
    Mutation("draws of multiplex: a token drawn twice", "decode_step", "& (c[None, :] < c[:, None])", "& (c[None, :] < 0)"),
    Mutation("draws: the stream", "decode_step", "stream = ((i + 1) // 2).to(tl.int64)", "stream = (i // 2).to(tl.int64)"),
    Mutation("draws: the cuts", "decode_step", "    if FILTER:\n        return tl.load(kept_mass + piece", "    if FILTER and not FILTER:\n        return tl.load(kept_mass + piece"),
    Mutation("draws: of greedy rows", "decode_step", "usable = (fault == 0) & (temperature != 0.0)", "usable = fault == 0"),
    Mutation("choice: one noise for all candidates", "gaussian_noise", "at = index % 4", "at = index % 2"),
    Mutation("choice: the mix of a row that is not", "decode_step", "weights = tl.where(gate, weights, tl.where(c == 0, 1.0, 0.0))", "weights = weights"),
    Mutation("choice: noise on every row", "decode_step", "size = tl.where(gate, noise_scale * unit * tl.sqrt_rn(squares / d), 0.0)", "size = noise_scale * unit * tl.sqrt_rn(squares / d)"),
    Mutation("noise: of the first block's size", "gaussian_noise", "size = tl.load(scales + row) * unit * tl.sqrt_rn(squares / d)", "size = tl.load(scales + row) * unit * squares / d"),
]  # fmt: skip


def survives(mutation: Mutation) -> bool:
    """Whether the tests of the operation pass although it is broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "*.egg-info", "runs")
        )
        source = copy / "kernels" / f"{mutation.module}.py"
        text = source.read_text()
        if text.count(mutation.before) != 1:
            raise ValueError(f"{mutation.name}: found {text.count(mutation.before)} times in {source.name}, expected 1")
        source.write_text(text.replace(mutation.before, mutation.after))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--hypothesis-profile",
            "unshrunk",
        ]
        tests = [
            *map(str, copy.glob(f"tests/test_{mutation.operation or mutation.module}*.py")),
            "-k",
            "triton or kernel or long_segments or deterministic",
        ]
        return subprocess.run([*command, *tests], cwd=copy, capture_output=True).returncode == 0


def main() -> int:
    chosen = [m for m in MUTATIONS if all(word in m.name or word in m.module for word in sys.argv[1:])]
    survivors = []
    with ThreadPoolExecutor(2) as pool:
        for mutation, survived in zip(chosen, pool.map(survives, chosen), strict=True):
            print(f"{'SURVIVED' if survived else 'noticed':<9} {mutation.module}: {mutation.name}", flush=True)
            survivors += [mutation] if survived else []
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
