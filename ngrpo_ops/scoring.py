"""What a score is, to the bit, and cheap upper bounds of it: the two halves of an exact search.

`ScoredRows.pair_scores` defines the scores. `OptimisticScores` bounds them from above by matrix multiplications.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .config import Metric
from .ops._library import load_kernels
from .ops._precision import FLOAT32_ROUNDOFF as _UNIT_ROUNDOFF
from .ops._precision import cpu_multiplies_bfloat16, has_matrix_units, matmul_input_roundoff

# With these a search stays below 256 MiB beyond its inputs and outputs, and the matrix multiplications stay large.
_COLUMN_TILE = 8192
_TILE_ELEMENTS = 2**23  # of one tile of rows, float32
_CAST_ELEMENTS = 2**19  # of rows on their way to a tile
_PAIR_ELEMENTS = 2**19  # of one block of re-scored pairs
_LOW_PRECISION_FROM = 2**22  # elements of a table; for less the casts are not worth it
_LOW_PRECISION_QUERIES = 32  # and for fewer queries the table's trip through memory is what takes the time
_KERNELS_FROM = 2**13  # rows to search: with fewer tiles, the best few of each leave too loose a bound


class ScoredRows:
    """The rows of an embedding in the form their metric scores them: float32, normalised for cosine.

    `backend` is what scores them, "eager" or "triton"; row 0 is called `first` in errors.
    """

    def __init__(self, embedding: Tensor, metric: Metric, *, backend: str = "eager", first: int = 0) -> None:
        self.kernels = load_kernels("nearest_neighbors") if backend == "triton" else None
        if self.kernels is not None and not (embedding.is_contiguous() and embedding.data_ptr() % 16 == 0):
            # The compiler may order a kernel's sums by strides and alignment, and the same rows are to score the same.
            embedding = embedding.clone(memory_format=torch.contiguous_format)
        self.embedding = embedding
        self.metric = metric
        norms = torch.cat([_norms(embedding[rows]) for rows in self.tiles()])
        broken = (~norms.isfinite()).nonzero().flatten()
        if broken.numel():
            some = ", ".join(str(first + i) for i in broken[:8].tolist()) + (", ..." if broken.numel() > 8 else "")
            raise ValueError(f"embedding must be finite, got NaN or inf in {broken.numel()} rows: {some}")
        limit = 1e30 if metric == "cosine" else 1e18
        if float(norms.max()) > limit:
            raise ValueError(
                f"embedding must have rows of norm at most {limit:g}, beyond which {metric} scores overflow float32, "
                f"got {float(norms.max()):.3g}"
            )
        # A zero row (of a norm below 1e-30) has similarity 0 to everything.
        zero = norms < 1e-30
        self.inverse_norms = torch.where(zero, 0.0, 1.0 / norms).float() if metric == "cosine" else None
        self.norms = (~zero).float() if metric == "cosine" else norms.float()

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def tiles(self) -> Iterator[slice]:
        size = min(_COLUMN_TILE, max(1, _TILE_ELEMENTS // self.embedding.shape[1]))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        x = self.embedding[rows].float()
        return x if self.inverse_norms is None else x * self.inverse_norms[rows, None]

    @functools.cached_property
    def bfloat16_roundoff(self) -> float:
        """The largest |x - bfloat16(x)| / |x| of the rows."""
        worst = 0.0
        part = max(1, _CAST_ELEMENTS // self.embedding.shape[1])
        for start in range(0, len(self), part):
            x = self[start : start + part]
            lost = torch.linalg.vector_norm(x.bfloat16().float().sub_(x), dim=1)
            worst = max(worst, float((lost / self.norms[start : start + part]).nan_to_num_(0.0).max()))
        return 1.001 * worst  # the rounding of these norms

    def pair_scores(self, rows: Tensor, others: ScoredRows, columns: Tensor) -> Tensor:
        """Scores of the pairs (rows[i], columns[i] of `others`), larger is nearer: float32 of the shape of `rows`.

        float32 arithmetic in blocks of one fixed shape, so that a pair's bits do not depend on which other pairs are
        scored with it.
        """
        shape, rows, columns = rows.shape, rows.reshape(-1), columns.reshape(-1)
        if self.kernels is not None:
            theirs = (others.embedding, others.inverse_norms, columns)
            return self.kernels.pair_scores(self.embedding, self.inverse_norms, rows, *theirs, self.metric).view(shape)
        out = torch.empty(rows.numel(), dtype=torch.float32, device=rows.device)
        block = max(1, _PAIR_ELEMENTS // self.embedding.shape[1])
        for start in range(0, rows.numel(), block):
            used = min(block, rows.numel() - start)
            # Padded to the one block shape: a reduction may pick its order of summation by shape.
            r, c = rows.new_zeros(block), rows.new_zeros(block)
            r[:used], c[:used] = rows[start : start + used], columns[start : start + used]
            x, y = self[r], others[c]
            if self.metric == "l2":
                scores = x.sub_(y).square_().sum(-1).neg_()
            elif self.metric == "l1":
                scores = x.sub_(y).abs_().sum(-1).neg_()
            else:
                scores = x.mul_(y).sum(-1)
            out[start : start + used] = scores[:used]
        return out.add_(0.0).view(shape)  # + 0.0: no negative zeros


def _norms(rows: Tensor) -> Tensor:
    """float64 [n]: summed in float32, which is many times faster, where its squares neither overflow nor underflow."""
    x = rows.float().contiguous()
    norms = torch.linalg.vector_norm(x, dim=1).double()
    unusual = (~((norms > 1e-15) & (norms < 1e18))).nonzero().squeeze(1)
    if unusual.numel():
        norms[unusual] = torch.linalg.vector_norm(x[unusual], dim=1, dtype=torch.float64)
    return norms


def _rounded_up(values: Tensor) -> Tensor:
    """At least `values` >= 0, and a bfloat16 number, which no matrix multiplication rounds."""
    return values.mul(1.0 + 2.0**-7).bfloat16().float()


def _in_three(values: Tensor) -> list[Tensor]:
    """float32 values as the sum of three bfloat16 numbers: 3 x 8 bits, no rounding."""
    high = values.bfloat16().float()
    middle = (values - high).bfloat16().float()
    return [high, middle, values - high - middle]


class OptimisticScores:
    """Scores of tiles of pairs by matrix multiplication, none below the re-scored value of its pair.

    With extra columns one inner product is coarse score + error bound; n = |x|, all sums exact but for rounding:

        cosine   x.y + s |x||y|                             query x, s |x|                  against y, |y|
        dot      x.y + s |x||y| + t                         query x, s |x|, t               against y, |y|, 1
        l2       2 x.y + 2 s |x||y| - (1 - r)(|x|^2 + |y|^2) + t
                 query 2 x, 2 s |x|, t - (1 - r)|x|^2, 1    against y, |y|, 1, -(1 - r)|y|^2
        l1       -(1 - r) |x - y|_1                         no inner product: many times slower

    Where u is the unit roundoff of float32 (2^-24):

    - Accumulating d + 9 products in float32, in any order, is off by at most (d + 9) u of the sum of their magnitudes,
      the re-scored value by (d + 4) u of the same, and a norm by (d / 2 + 2) u of itself, its square by twice that.
      Those magnitudes add up to at most |x||y| (cosine and dot) or (|x| + |y|)^2 (l2): r = 3.3 (d + 16) u covers all.
    - A multiplication of inputs rounded to x + e, |e| <= p |x|, is off by at most (2 p + p^2)|x||y| by Cauchy and
      Schwarz: s = r + 2.01 p. For bfloat16 p is the largest of the rows, measured: about 2^-9.3 where the format
      promises 2^-8, and 0 for a bfloat16 table. The extra columns are bfloat16 numbers (the squares sums of three),
      which no multiplication rounds.
    - t bounds what underflow takes from products, flushed or not. bfloat16 may flush inputs too: it is only used where
      no row but zero rows has a norm below 1e-15, whose slack is far above that.

    - Tensor cores may cut where float32 arithmetic rounds: r is twice that for the kernels.

    A tile is stored in `dtype`; bfloat16 rounds its results once more, which `ceiling` and `below` account for. For
    the kernels, which keep their tiles in float32 registers, the rows are bfloat16 and padded to their step, but
    float32 for l1.
    """

    def __init__(self, queries: ScoredRows, columns: ScoredRows, count: int) -> None:
        """`count`: how many of the queries are meant. Few of them are scored in float32 tiles."""
        self.queries, self.columns = queries, columns
        self.metric = queries.metric
        d = queries.embedding.shape[1]
        distances = self.metric == "l1"
        ordinary = distances or not any(
            bool(((rows.norms > 0) & (rows.norms < 1e-15)).any()) for rows in (queries, columns)
        )
        fusible = ordinary and count and len(columns) >= _KERNELS_FROM
        self.kernels = queries.kernels if fusible and has_matrix_units(columns.embedding.device) else None
        low = (
            ordinary
            and not distances
            and columns.embedding.device.type == "cpu"
            and cpu_multiplies_bfloat16()
            and columns.embedding.numel() >= _LOW_PRECISION_FROM
            and count >= _LOW_PRECISION_QUERIES
        )
        fused = self.kernels is not None
        self.dtype = torch.bfloat16 if low and not fused else torch.float32
        self.input_dtype = torch.bfloat16 if fused and not distances else self.dtype
        self.step = self.kernels.STEP if self.kernels is not None else 1
        self.square_slack = (6.6 if fused else 3.3) * (d + 16) * _UNIT_ROUNDOFF
        if self.input_dtype == torch.bfloat16:
            roundoff = max(rows.bfloat16_roundoff for rows in (queries, columns))
        else:
            roundoff = matmul_input_roundoff()
        self.slack = self.square_slack + 2.01 * roundoff
        self.underflow = 2.0 * (d + 16) * torch.finfo(torch.float32).smallest_normal

    def prepared_queries(self, index: slice | Tensor) -> Tensor:
        rows = self.queries
        if self.metric == "l1":
            return rows[index].contiguous()
        norm = rows.norms[index]
        extra = [_rounded_up((2.0 if self.metric == "l2" else 1.0) * self.slack * norm)]
        if self.metric == "dot":
            extra.append(torch.full_like(norm, self.underflow).bfloat16().float() * 2.0)
        elif self.metric == "l2":
            one = torch.ones_like(norm)
            extra += [*_in_three((self.square_slack - 1.0) * norm.square() + self.underflow), one, one, one]
        return self._augmented(rows, index, extra, 2.0 if self.metric == "l2" else 1.0)

    def prepared_columns(self, index: slice | Tensor) -> Tensor:
        rows = self.columns
        if self.metric == "l1":
            return rows[index].contiguous()
        norm = rows.norms[index]
        one = torch.ones_like(norm)
        extra = [_rounded_up(norm)]
        if self.metric == "dot":
            extra.append(one)
        elif self.metric == "l2":
            extra += [one, one, one, *_in_three((self.square_slack - 1.0) * norm.square())]
        return self._augmented(rows, index, extra, 1.0)

    def _augmented(self, rows: ScoredRows, index: slice | Tensor, extra: list[Tensor], scale: float) -> Tensor:
        n, d = extra[0].shape[0], rows.embedding.shape[1]
        width = -(-(d + len(extra)) // self.step) * self.step
        out = torch.empty(n, width, dtype=self.input_dtype, device=rows.embedding.device)
        out[:, d + len(extra) :] = 0
        part = max(1, _CAST_ELEMENTS // d)
        for start in range(0, n, part):
            span = slice(start, min(start + part, n))
            chosen = (
                slice(index.start + span.start, index.start + span.stop) if isinstance(index, slice) else index[span]
            )
            # In float32, then cast as a whole: many times faster than a product written as bfloat16.
            out[span, :d] = rows[chosen] if scale == 1.0 else rows[chosen].mul(scale)
        for column, values in enumerate(extra, start=d):
            out[:, column] = values
        return out

    def tile(self, queries: Tensor, columns: Tensor, out: Tensor) -> None:
        """Optimistic scores of prepared queries [q, .] and columns [n, .] into out [q, n]."""
        if self.metric == "l1":
            for part in torch.arange(queries.shape[0], device=out.device).split(256):  # bounds the memory of cdist
                out[part] = torch.cdist(queries[part], columns, p=1.0).mul_(self.square_slack - 1.0)
        else:
            torch.mm(queries, columns.T, out=out)

    def tile_best(self, queries: Tensor, columns: Tensor, own: Tensor, best: int) -> tuple[Tensor, ...]:
        """The kernels' `tile_best` of prepared rows, its scores optimistic."""
        assert self.kernels is not None
        values, places = self.kernels.tile_best(queries, columns, self.metric, own, best)
        return self._optimistic(values), places

    def tile_best_symmetric(self, rows: Tensor, columns: Tensor, best: int, *, diagonal: bool) -> tuple[Tensor, ...]:
        """The kernels' `tile_best_symmetric` of prepared rows, its scores optimistic."""
        assert self.kernels is not None
        x, x_at, y, y_at = self.kernels.tile_best_symmetric(rows, columns, self.metric, best, diagonal=diagonal)
        return self._optimistic(x), x_at, self._optimistic(y), y_at

    def _optimistic(self, values: Tensor) -> Tensor:
        return values.mul_(1.0 - self.square_slack) if self.metric == "l1" else values

    def ceiling(self, values: Tensor) -> Tensor:
        """float32: no score that was stored as `values` was above this before it was rounded to the nearest."""
        if self.dtype == torch.float32:
            return values
        above = values.nextafter(torch.full_like(values, torch.inf)).float()
        return torch.where(values == -torch.inf, -torch.inf, 0.5 * (values.float() + above))

    def below(self, scores: Tensor) -> Tensor:
        """In the dtype of the tiles: a pair stored at this or less scores strictly below float32 `scores`."""
        if self.dtype == torch.float32:
            return scores.nextafter(torch.full_like(scores, -torch.inf))
        rounded = scores.bfloat16()
        low = torch.full_like(rounded, -torch.inf)
        rounded = torch.where(rounded.float() > scores, rounded.nextafter(low), rounded)
        return rounded.nextafter(low)

    def spread(self, ceilings: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """float32: how far below its ceiling the re-scored value of a pair may lie."""
        if self.metric == "l1":
            return 2.2 * self.square_slack * ceilings.abs()
        x, y = self.queries.norms[rows], self.columns.norms[columns]
        error = self.slack * x * y + self.underflow
        if self.metric == "l2":
            error = 2.0 * error + self.square_slack * (x.square() + y.square())
        # Twice the error, what rounding its columns up added to it, and the rounding of the result to bfloat16.
        return 2.1 * error + (0.0 if self.dtype == torch.float32 else 1.01 * 2.0**-7) * ceilings.abs()
