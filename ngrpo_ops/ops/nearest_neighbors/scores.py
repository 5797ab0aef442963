"""What the score of two rows is, to the bit.

Every score that a search returns comes from `ScoredRows.pair_scores`. The bounds in `bounds` only decide which pairs
need one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...config import Metric
from .._library import load_kernels
from .row_hashes import first_equal_rows, suspected_rows

# These limits keep a search below 256 MiB beyond its inputs and outputs, and the matrix multiplications large.
_COLUMN_TILE = 8192  # rows
_TILE_ELEMENTS = 2**23  # float32, in one tile of rows
_CAST_ELEMENTS = 2**19  # in one block of rows that is converted
_PAIR_ELEMENTS = 2**19  # in one block of pairs that is scored

_ZERO_NORM = 1e-30  # a row with a smaller norm counts as a zero row
MAX_NORM = {"cosine": 1e30, "dot": 1e18, "l2": 1e18, "l1": 1e18}  # larger norms overflow float32 scores


def rows_per_tile(d: int, limit: int) -> int:
    """The number of rows of width d in one tile, at most `limit`."""
    return max(1, min(limit, _TILE_ELEMENTS // d))


class ScoredRows:
    """The rows of an embedding as their metric scores them: in float32, and normalized for cosine.

    Args:
        embedding: [n, d], floating point. A row with a norm below 1e-30 counts as a zero row.
        metric: "cosine", "dot", "l2" or "l1".
        backend: "eager" or "triton", the implementation that scores pairs.
        first_id: the id of row 0 in error messages.
        find_equal: whether `first_equal` will be asked for. A GPU is then not waited for again where no rows are equal.

    Attributes:
        norms: float32 [n]; for cosine 1, and 0 for zero rows.
        inverse_norms: float32 [n], by which rows are multiplied for cosine; None for other metrics.
        roundoffs: float32 [n], what bfloat16 changes a row by, relative to its norm, for the kernels; else None.
        num_zero: the number of rows that score 0 with every row.

    Raises:
        ValueError: a row with NaN or inf, or a norm beyond which scores overflow float32.
    """

    def __init__(
        self,
        embedding: Tensor,
        metric: Metric,
        *,
        backend: str = "eager",
        first_id: int = 0,
        find_equal: bool = False,
    ) -> None:
        self.backend = backend
        self.kernels = load_kernels("nearest_neighbors") if backend == "triton" else None
        if self.kernels is not None and not (embedding.is_contiguous() and embedding.data_ptr() % 16 == 0):
            # The compiler may order a kernel's sums by strides and alignment. Equal rows must have equal scores.
            embedding = embedding.clone(memory_format=torch.contiguous_format)
        self.embedding = embedding
        self.metric = metric
        self.roundoffs: Tensor | None = None
        if backend == "triton":
            statistics = load_kernels("nearest_neighbors_rows").row_statistics(embedding, metric)
            norms, inverse_norms, self.roundoffs, finite = statistics
        else:
            none = torch.zeros(0, dtype=torch.float64, device=embedding.device)
            norms = torch.cat([none, *(_row_norms(embedding[rows]) for rows in self.tiles())])
            inverse_norms = torch.where(norms < _ZERO_NORM, 0.0, 1.0 / norms).float()
            finite = norms.isfinite()
        zero = norms < _ZERO_NORM
        self.inverse_norms = inverse_norms if metric == "cosine" else None
        # A norm of 0 is of a zero row alone. A larger norm only makes the bounds looser.
        least = torch.finfo(torch.float32).smallest_normal
        self.norms = (~zero).float() if metric == "cosine" else norms.float().clamp(min=least) * (norms > 0)
        find_equal = find_equal and backend == "triton" and len(embedding) > 0
        suspected = suspected_rows(embedding) if find_equal else zero.new_zeros(())
        self._suspected = suspected if find_equal else None
        # One tensor, so that a GPU is waited for once.
        facts = [(~finite).sum(), suspected.sum(), self.is_zero.sum(), norms.max() if len(norms) else zero.sum()]
        nonfinite, self._num_suspected, self.num_zero, largest = torch.stack([x.double() for x in facts]).tolist()
        if nonfinite:
            rows = (~finite).nonzero().flatten()
            ids = ", ".join(str(first_id + i) for i in rows[:8].tolist()) + (", ..." if nonfinite > 8 else "")
            raise ValueError(f"embedding must be finite, got NaN or inf in {int(nonfinite)} rows: {ids}")
        if largest > MAX_NORM[metric]:
            raise ValueError(
                f"embedding must have rows of norm at most {MAX_NORM[metric]:g}, beyond which {metric} scores "
                f"overflow float32, got {largest:.3g}"
            )

    @functools.cached_property
    def first_equal(self) -> Tensor | None:
        """int64 [n]: the first row with the values of each row; None: no two rows are equal."""
        if self._suspected is None:
            self._suspected = suspected_rows(self.embedding)
        elif not self._num_suspected:
            return None
        return first_equal_rows(self.embedding, self._suspected)

    @property
    def has_equal(self) -> Tensor:
        """bool [n]: the rows with the values of another row."""
        first = self.first_equal
        if first is None:
            return torch.zeros(len(self), dtype=torch.bool, device=self.embedding.device)
        return (torch.bincount(first, minlength=len(self)) > 1)[first]

    def snapshot(self) -> ScoredRows:
        """The same rows in memory of their own, which no later change of the embedding reaches."""
        rows = copy.copy(self)
        rows.embedding = self.embedding.clone()
        return rows

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        x = self.embedding[rows].float()
        return x if self.inverse_norms is None else x * self.inverse_norms[rows, None]

    def _gather(self, rows: Tensor, out: Tensor) -> None:
        """Writes some rows to float32 [n, d]: the values of `self[rows]`."""
        if self.embedding.dtype == torch.float32:
            torch.index_select(self.embedding, 0, rows, out=out)
        else:
            out.copy_(self.embedding.index_select(0, rows))
        if self.inverse_norms is not None:
            out.mul_(self.inverse_norms[rows, None])

    @property
    def is_zero(self) -> Tensor:
        """bool [n], rows that score 0 with every row; none for l1 and l2."""
        return self.norms == 0 if self.metric in ("cosine", "dot") else torch.zeros_like(self.norms, dtype=torch.bool)

    @property
    def tile_size(self) -> int:
        """Rows in one tile."""
        return rows_per_tile(self.embedding.shape[1], _COLUMN_TILE)

    @property
    def cast_size(self) -> int:
        """Rows that are converted at a time."""
        return max(1, _CAST_ELEMENTS // self.embedding.shape[1])

    def tiles(self) -> Iterator[slice]:
        for start in range(0, len(self), self.tile_size):
            yield slice(start, min(start + self.tile_size, len(self)))

    @functools.cached_property
    def bfloat16_roundoff(self) -> float:
        """The largest |x - bfloat16(x)| / |x| of the rows."""
        largest = 0.0
        for start in range(0, len(self), self.cast_size):
            x = self[start : start + self.cast_size]
            error = torch.linalg.vector_norm(x.bfloat16().float().sub_(x), dim=1)
            relative = (error / self.norms[start : start + self.cast_size]).nan_to_num_(0.0)  # zero rows: 0 / 0
            largest = max(largest, float(relative.max()))
        return 1.001 * largest  # covers the rounding of these norms

    def pair_scores(self, rows: Tensor, others: ScoredRows, columns: Tensor) -> Tensor:
        """Scores of the pairs (rows[i], columns[i] of `others`): float32, larger is nearer, in the shape of `rows`.

        cosine and dot are inner products, l2 is the negative squared distance, l1 the negative distance. Distances are
        summed from differences, never from |x|^2 + |y|^2 - 2 x.y.

        The bits of a score depend on its two rows alone, not on the other pairs of the call.
        """
        shape, rows, columns = rows.shape, rows.reshape(-1), columns.reshape(-1)
        if self.kernels is not None:
            scores = self.kernels.pair_scores(
                self.embedding, self.inverse_norms, rows, others.embedding, others.inverse_norms, columns, self.metric
            )
            return scores.view(shape)
        out = torch.empty(rows.numel(), dtype=torch.float32, device=rows.device)
        d = self.embedding.shape[1]
        block = max(1, _PAIR_ELEMENTS // d)
        # All blocks are padded to one shape, because a reduction may choose its order of summation by the shape. They
        # are written to the same memory, because fresh memory takes longer than the arithmetic.
        x, y = torch.empty(2, block, d, dtype=torch.float32, device=rows.device)
        row_ids, column_ids = torch.zeros(2, block, dtype=torch.int64, device=rows.device)
        for start in range(0, rows.numel(), block):
            used = min(block, rows.numel() - start)
            row_ids[:used], column_ids[:used] = rows[start : start + used], columns[start : start + used]
            self._gather(row_ids, x)
            others._gather(column_ids, y)
            if self.metric == "l2":
                scores = x.sub_(y).square_().sum(-1).neg_()
            elif self.metric == "l1":
                scores = x.sub_(y).abs_().sum(-1).neg_()
            else:
                scores = x.mul_(y).sum(-1)
            out[start : start + used] = scores[:used]
        return out.add_(0.0).view(shape)  # turns -0.0 into 0.0


def _row_norms(rows: Tensor) -> Tensor:
    """Norms of the rows, float64 [n].

    The sums are in float32, which is many times faster, except for norms whose squares might overflow or underflow.
    """
    x = rows.float().contiguous()
    norms = torch.linalg.vector_norm(x, dim=1).double()
    extreme = (~((norms > 1e-15) & (norms < 1e18))).nonzero().squeeze(1)
    if extreme.numel():
        norms[extreme] = torch.linalg.vector_norm(x[extreme], dim=1, dtype=torch.float64)
    return norms
