"""Upper bounds of scores, computed by matrix multiplication, and the constants of their proof.

A search may skip a pair whose upper bound is too low. An upper bound below the true score would lose a neighbor
silently, so every constant that makes it a bound stands in this module, once, beside its derivation.

Notation: u is the unit roundoff of float32 (2^-24), d the width of the rows. The score is always the value that
`ScoredRows.pair_scores` returns, rounding included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import FLOAT32_ROUNDOFF, cpu_multiplies_bfloat16, matmul_input_roundoff
from .scores import ScoredRows

_LOW_PRECISION_FROM = 2**22  # elements of a table: in a smaller one the conversion costs more than it saves
_FEW_QUERIES = 32  # with fewer, reading the table takes most of the time
_MIN_BFLOAT16_NORM = 1e-15  # see `underflow_error`

# The constants of the proof ---------------------------------------------------------------------------------------


def rounding_error(d: int, *, truncating: bool = False) -> float:
    """r: the float32 rounding in an upper bound and in the score it stands for, together and relative.

    - An inner product of at most d + 9 terms, accumulated in float32 in any order, is off by at most (d + 9) u times
      the sum of the magnitudes of its terms. The score is off by at most (d + 4) u times the same sum.
    - A norm is off by at most (d / 2 + 2) u times itself, and its square by twice that.
    - The magnitudes add up to at most |x||y| for cosine and dot, and to (|x| + |y|)^2 for l2.

    r = 3.3 (d + 16) u covers all of it.

    Args:
        truncating: whether the accumulation may truncate where float32 arithmetic rounds, as tensor cores may. That
            doubles r.
    """
    return (2.0 if truncating else 1.0) * 3.3 * (d + 16) * FLOAT32_ROUNDOFF


def input_rounding_error(roundoff: float) -> float:
    """What rounding the inputs of a multiplication adds to r: 2.01 p, relative to |x||y|.

    Inputs rounded to x + e with |e| <= p |x| change the inner product by at most (2 p + p^2) |x||y|, by Cauchy and
    Schwarz. p is at most 2^-7, so that 2.01 p covers it.

    Args:
        roundoff: p. For bfloat16 it is measured (`ScoredRows.bfloat16_roundoff`): about 2^-9.3 for float32 rows, where
            the format guarantees 2^-8, and 0 for rows that are bfloat16 already.
    """
    return 2.01 * roundoff


def underflow_error(d: int) -> float:
    """t: the absolute error from products that underflow, flushed to zero or not.

    The bound and the score have fewer than 2 (d + 16) products together, and each loses at most the smallest normal
    number.

    - bfloat16 multiplications may also flush their inputs. They are only used where every row but zero rows has a norm
      of at least 1e-15, for which the error that s allows is far above that loss.
    - A product that is normalized after it was summed loses that much over the norm of a row, which is at least 1e-30:
      0.4 (d + 16) u. r covers it, as the roundings that it stands for are 2 (d + 9) u.
    """
    return 2.0 * (d + 16) * torch.finfo(torch.float32).smallest_normal


def distance_upper_bound(distances: Tensor, d: int) -> Tensor:
    """At least the distances between pairs of rows, given their float32 evaluation as float64.

    The difference and the norm are off by at most (d + 8) u, relative. A coordinate whose square underflows is shorter
    than 2^-62.
    """
    return distances * (1.0 + FLOAT32_ROUNDOFF * (d + 8)) + d * 2.0**-62


# Matrix multiplications that bound ----------------------------------------------------------------------------------


class PreparedColumns(NamedTuple):
    """The columns of a tile: its results are (queries . rows) * scales + extra columns of queries . extra.

    Attributes:
        rows: [n, .]; with their extra columns, if they have any, where `extra` is None.
        scales: float32 [n]; None: 1.
        extra: [n, .]; None: there are none, or they stand in `rows`.
    """

    rows: Tensor
    scales: Tensor | None = None
    extra: Tensor | None = None


class OptimisticScores:
    """Upper bounds of the scores of all pairs of a tile. None is below the score of its pair.

    For cosine all rows are of norm 1 or 0, and the error bound is added where a result of a tile is read. Else the rows
    get extra columns, so that one inner product gives approximate score + error bound. With r, s = r + 2.01 p and t as
    defined by `rounding_error`, `input_rounding_error` and `underflow_error`:

        cosine   x.y + s                                    query x                         against y; s is added later
        dot      x.y + s |x||y| + t                         query x, s |x|, t               against y, |y|, 1
        l2       2 x.y + 2 s |x||y| - (1 - r)(|x|^2 + |y|^2) + t
                 query 2 x, 2 s |x|, t - (1 - r)|x|^2, 1    against y, |y|, 1, -(1 - r)|y|^2
        l1       -(1 - r) |x - y|_1                         no inner product: many times slower

    The extra columns are bfloat16 numbers, which no multiplication rounds; each square is the sum of three.

    For few queries the columns are multiplied as they are in memory, since a copy of the table takes longer than its
    product. For cosine the results are then normalized; else the extra columns are multiplied apart. That rounds once
    more, and so does the later s. r covers both.

    Tiles are stored in `dtype`. Storing in bfloat16 rounds the results once more: `upper_bound`, `threshold_below` and
    `error_bound` account for that.

    Args:
        queries, columns: the rows of the two sides of a tile, of one metric.
        count: how many queries there will be.
    """

    def __init__(self, queries: ScoredRows, columns: ScoredRows, count: int) -> None:
        self.queries, self.columns = queries, columns
        self.metric = queries.metric
        d = queries.embedding.shape[1]
        may_be_bfloat16 = (
            self.metric != "l1"
            and columns.embedding.device.type == "cpu"
            and cpu_multiplies_bfloat16()
            and columns.embedding.numel() >= _LOW_PRECISION_FROM
            and count >= _FEW_QUERIES
        )
        is_bfloat16 = may_be_bfloat16 and not any(
            bool(((rows.norms > 0) & (rows.norms < _MIN_BFLOAT16_NORM)).any()) for rows in (queries, columns)
        )
        self._as_they_are = self.metric != "l1" and count < _FEW_QUERIES
        self.dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        if is_bfloat16:
            roundoff = max(rows.bfloat16_roundoff for rows in (queries, columns))
        else:
            roundoff = matmul_input_roundoff()
        self.rounding = rounding_error(d)
        self.product_error = self.rounding + input_rounding_error(roundoff)
        self.underflow = underflow_error(d)
        self.later = self.product_error if self.metric == "cosine" else 0.0  # what a result is still to gain

    def prepared_queries(self, index: slice | Tensor) -> Tensor:
        """Some of the queries with their extra columns."""
        rows = self.queries
        if self.metric == "l1":
            return rows[index].contiguous()
        if self.metric == "cosine":
            return self._augmented(rows, index, [], 1.0)
        norm = rows.norms[index]
        scale = 2.0 if self.metric == "l2" else 1.0
        extra = [_round_up_to_bfloat16(scale * self.product_error * norm)]
        if self.metric == "dot":
            extra.append(torch.full_like(norm, self.underflow).bfloat16().float() * 2.0)
        elif self.metric == "l2":
            one = torch.ones_like(norm)
            extra += [*_split_into_bfloat16((self.rounding - 1.0) * norm.square() + self.underflow), one, one, one]
        return self._augmented(rows, index, extra, scale)

    def prepared_columns(self, index: slice | Tensor) -> PreparedColumns:
        """Some of the columns with their extra columns."""
        rows = self.columns
        if self.metric == "l1":
            return PreparedColumns(rows[index].contiguous())
        norm = rows.norms[index]
        one = torch.ones_like(norm)
        extra = [] if self.metric == "cosine" else [_round_up_to_bfloat16(norm)]
        if self.metric == "dot":
            extra.append(one)
        elif self.metric == "l2":
            extra += [one, one, one, *_split_into_bfloat16((self.rounding - 1.0) * norm.square())]
        if not self._as_they_are:
            return PreparedColumns(self._augmented(rows, index, extra, 1.0))
        scales = None if rows.inverse_norms is None else rows.inverse_norms[index]
        return PreparedColumns(rows.embedding[index].float(), scales, torch.stack(extra, dim=1) if extra else None)

    def _augmented(self, rows: ScoredRows, index: slice | Tensor, extra: list[Tensor], scale: float) -> Tensor:
        n, d = rows.norms[index].shape[0], rows.embedding.shape[1]
        out = torch.empty(n, d + len(extra), dtype=self.dtype, device=rows.embedding.device)
        for start in range(0, n, rows.cast_size):
            span = slice(start, min(start + rows.cast_size, n))
            chosen = (
                slice(index.start + span.start, index.start + span.stop) if isinstance(index, slice) else index[span]
            )
            # Multiplied in float32 and converted as a whole: many times faster than a product written as bfloat16.
            out[span, :d] = rows[chosen] if scale == 1.0 else rows[chosen].mul(scale)
        for column, values in enumerate(extra, start=d):
            out[:, column] = values
        return out

    def write_tile(self, queries: Tensor, columns: PreparedColumns, out: Tensor) -> None:
        """Writes the results of prepared queries [q, .] and n prepared columns to out [q, n], for `upper_bound`."""
        rows, scales, extra = columns
        if self.metric == "l1":
            for block in torch.arange(queries.shape[0], device=out.device).split(256):  # bounds the memory of cdist
                out[block] = torch.cdist(queries[block], rows, p=1.0).mul_(self.rounding - 1.0)
            return
        width = rows.shape[1]
        torch.mm(queries[:, :width], rows.T, out=out)
        if scales is not None:
            out.mul_(scales)
        if extra is not None:
            out.addmm_(queries[:, width:], extra.T)

    def upper_bound(self, values: Tensor) -> Tensor:
        """float32: at least the score of every pair whose result is stored in a tile as `values`."""
        if self.dtype == torch.float32:
            return values + self.later
        above = values.nextafter(torch.full_like(values, torch.inf)).float()
        return torch.where(values == -torch.inf, -torch.inf, 0.5 * (values.float() + above) + self.later)

    def threshold_below(self, scores: Tensor) -> Tensor:
        """In the dtype of the tiles: a pair stored at this value or less scores strictly below float32 `scores`."""
        scores = scores - self.later
        if self.dtype == torch.float32:
            return scores.nextafter(torch.full_like(scores, -torch.inf))
        rounded = scores.bfloat16()
        lowest = torch.full_like(rounded, -torch.inf)
        rounded = torch.where(rounded.float() > scores, rounded.nextafter(lowest), rounded)
        return rounded.nextafter(lowest)

    def error_bound(self, upper_bounds: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """float32: how far the score of a pair may lie below its upper bound.

        For cosine, dot and l2 that is twice the error that the upper bound adds, what rounding its columns up added to
        it (2.1 together), and the rounding of the result to bfloat16 (1.01 * 2^-7). For l1 it is 2.2 r. For cosine zero
        rows gain s like others.
        """
        if self.metric == "l1":
            return 2.2 * self.rounding * upper_bounds.abs()
        if self.metric == "cosine":
            error = torch.full_like(upper_bounds, self.product_error)
        else:
            x, y = self.queries.norms[rows], self.columns.norms[columns]
            error = self.product_error * x * y + self.underflow
        if self.metric == "l2":
            error = 2.0 * error + self.rounding * (x.square() + y.square())
        return 2.1 * error + (0.0 if self.dtype == torch.float32 else 1.01 * 2.0**-7) * upper_bounds.abs()


def _round_up_to_bfloat16(values: Tensor) -> Tensor:
    """At least `values` >= 0: a bfloat16 number, as float32."""
    return values.mul(1.0 + 2.0**-7).bfloat16().float()


def _split_into_bfloat16(values: Tensor) -> list[Tensor]:
    """Three bfloat16 numbers that add up to the float32 values: 3 x 8 bits, without rounding."""
    high = values.bfloat16().float()
    middle = (values - high).bfloat16().float()
    return [high, middle, values - high - middle]
