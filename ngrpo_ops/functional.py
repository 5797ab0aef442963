"""The public functions: what they compute, what they accept, and the checks; the arithmetic is behind `ops`."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from . import _operations as ops
from . import advantages, reference, sharded
from .advantages import Whitening
from .config import Metric
from .ops._checks import (
    require_choice,
    require_embedding,
    require_flag,
    require_floating,
    require_ids,
    require_integer,
    require_mask,
    require_neighbors,
    require_number,
    require_positive,
    require_same_device,
    require_shape,
    require_table,
    require_tensor,
)
from .ops._library import choose_backend
from .search import Progress


class NearestNeighbors(NamedTuple):
    """ids [Q, k] int64, best first; scores [Q, k] float32, larger is nearer."""

    ids: Tensor
    scores: Tensor


def nearest_neighbors(
    embedding: Tensor,
    k: int,
    *,
    metric: Metric = "cosine",
    queries: Tensor | None = None,
    allowed: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> NearestNeighbors:
    """The k most similar *other* rows of an embedding table, for every row or for the rows in `queries`.

    The candidates C of N-GRPO are the anchor and its k - 1 nearest neighbours by cosine (equations 7 and 8); here `k`
    counts neighbours. The result is exact: the ids are those of scoring every pair in float32, equal scores by the
    lower id. The search runs in tiles and never holds a [V, V] matrix: at most 256 MiB beyond inputs and outputs.

    Args:
        embedding: [V, d], floating point, finite; scored in float32. A DTensor with sharded rows (FSDP) is searched
            where it is: every rank of its mesh must call this, scores its own rows against those of the others, and
            gets the result for all V, the same as without shards.
        k: neighbours a row, 1 <= k < V.
        metric: "cosine" (a zero row has similarity 0 to every row), "dot", "l2" (negative squared distance) or "l1"
            (negative distance; it has no matrix-multiplication form and is many times slower).
        queries: int64 [Q], ids of the rows whose neighbours are wanted; None: all V, in order.
        allowed: bool [V], rows that may be returned; None: all. At least k + 1 of them.
        group: a process group of which each rank has some consecutive rows (maybe none) of the table as `embedding`, in
            the order of the ranks: searched as a DTensor is.
        backend: None to choose, "eager" or "triton".
        progress: called with (rows done, rows in all) as a long search goes on.

    Returns:
        ids [Q, k] int64 and scores [Q, k] float32, nearest first. Not differentiable.

    Raises:
        TypeError: ids or a mask of another dtype.
        ValueError: k out of range, NaN or inf in the embedding, an empty table, queries out of range or empty, too few
            allowed rows, an unknown metric or backend, shapes that do not fit; a DTensor sharded otherwise than by
            rows, queries of a sharded table. What is wrong on one rank is raised on all.
    """
    require_choice(metric, get_args(Metric), "metric")
    if isinstance(embedding, DTensor):
        embedding, group = sharded.local_rows(embedding)

    def check(vocabulary: int) -> None:
        require_neighbors(vocabulary, k)
        if allowed is not None:
            require_mask(allowed, (vocabulary,), "allowed", "[V]")
            require_same_device("allowed", allowed, "embedding", embedding)
            if group is not None:  # else where the operation runs: it reads the mask
                reference.require_enough_allowed(allowed, k)

    if group is not None:
        require_table(embedding)
        if queries is not None:
            raise ValueError("queries of a sharded embedding cannot be searched: leave queries out, for all rows")
        return NearestNeighbors(
            *sharded.nearest_neighbors(
                embedding.detach(), group, k, metric, allowed, choose_backend(backend, embedding), progress, check
            )
        )
    require_embedding(embedding)
    check(embedding.shape[0])
    if queries is not None:
        require_ids(queries, "queries")
        require_same_device("queries", queries, "embedding", embedding)
        if queries.dim() != 1 or queries.numel() == 0:
            raise ValueError(f"queries must be a non-empty vector of row ids, got shape {tuple(queries.shape)}")
    embedding, backend = embedding.detach(), choose_backend(backend, embedding)
    if progress is None:
        return NearestNeighbors(*ops.nearest_neighbors(embedding, k, metric, queries, allowed, backend))
    return NearestNeighbors(*reference.nearest_neighbors(embedding, k, metric, queries, allowed, backend, progress))


def mix_embeddings(
    embedding: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    padding_id: int | None = None,
    out_rows: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of embedding rows, sum_c weights_c E[ids_c] (equation 10): the input of a mixed step.

    Args:
        embedding: E [V, d], floating point.
        ids: int64 [..., k], values in [0, V); repeated ids add up.
        weights: floating point, the shape of `ids`. They need not sum to 1. A weight of 0 adds nothing, whatever its
            row holds; a position with a single weight, 1, is a copy of its row.
        padding_id: candidates of this id are not there: they add nothing and get no gradient. It may lie outside
            [0, V), -1 say. None: no such id.
        out_rows: int64 [M], the positions, counted over the leading shape, that are wanted; the result is [M, d] and
            only they are computed. None: all.
        deterministic: the gradient of E is summed in a fixed order, in float32, and written once in E's dtype. False
            lets the GPU kernel add atomically instead; torch.use_deterministic_algorithms(True) overrules it.
        backend: None, "eager" or "triton"; None is "triton" on a GPU for k <= 32 and up to float32, or under
            TRITON_INTERPRET=1.

    Returns:
        [..., d] in E's dtype, accumulated in float32 (float64 for float64). Differentiable once in `embedding` (a
        dense gradient) and in `weights`.

    Raises:
        TypeError: ids that are not int64, a DTensor. ValueError: shapes that do not fit, an empty table or no
            candidates, ids out of range (checked on the CPU; on a GPU such a position is NaN), a backend that cannot
            be used.
    """
    require_embedding(embedding)
    require_ids(ids, "ids")
    require_floating(weights, "weights")
    if ids.dim() < 1 or ids.shape[-1] == 0:
        raise ValueError(f"ids must be [..., k] with k >= 1, got shape {tuple(ids.shape)}")
    require_shape(weights, tuple(ids.shape), "weights", "that of ids")
    require_same_device("ids", ids, "embedding", embedding)
    require_same_device("weights", weights, "embedding", embedding)
    require_integer(padding_id, "padding_id", optional=True)
    require_flag(deterministic, "deterministic")
    k, d = ids.shape[-1], embedding.shape[1]
    shape = ids.shape[:-1]
    ids, weights = ids.reshape(-1, k), weights.reshape(-1, k)
    if out_rows is not None:
        require_ids(out_rows, "out_rows")
        if out_rows.dim() != 1:
            raise ValueError(f"out_rows must be [M], got shape {tuple(out_rows.shape)}")
        require_same_device("out_rows", out_rows, "embedding", embedding)
        reference.require_ids_in_range(out_rows, ids.shape[0], "out_rows")
        shape, ids, weights = out_rows.shape, ids[out_rows], weights[out_rows]
    unsupported = f"the kernel takes k <= {_MAX_K}, got {k}" if k > _MAX_K else None
    backend = choose_backend(backend, embedding, unsupported)
    return ops.mix_embeddings(embedding, ids, weights, padding_id, deterministic, backend).view(*shape, d)


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-4,
    mask: Tensor | None = None,
    reward_weights: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    nan_policy: str = "propagate",
    singles: str = "zero",
    whitening: Whitening | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group-relative advantages (r - baseline) / (scale + eps), one a completion (equation 12).

    The defaults are those of TRL's GRPOTrainer; `ADVANTAGE_PRESETS` has the settings of each trainer's modes:
    `group_advantages(rewards, group_size=8, **ADVANTAGE_PRESETS["verl/rloo"])`.

    Args:
        rewards: [N], or [N, R] from R reward functions; floating point; computed in float32 (float64 for float64).
        group_size: rows of a group, one after the other; divides N. Exactly one of it, `group_ids` and `offsets` is
            given.
        group_ids: int64 [N], a label a row; groups need not be contiguous nor equal in size.
        offsets: int64 [G + 1], from 0 to N and never falling (checked on the CPU): group g is rows offsets[g] to
            offsets[g + 1]. On a GPU rows in no group get 0.
        baseline: "mean" of the group, "leave_one_out", the mean of the group's others, or "none".
        scale: "std" of the group, "batch_std" over all rows, "mean" of the group, or "none" (then eps is not used).
        ddof: the standard deviations divide by (n - ddof).
        eps: added to the scale, >= 0. Equal rewards give exactly 0 whatever it is.
        mask: bool [N]; False rows have no part in any statistic and get 0.
        reward_weights: [R], floating point; of the reward functions. None: 1 each.
        aggregation: for R functions, "sum_then_normalize", or "normalize_then_sum" (GDPO): each normalised by itself.
        nan_policy: "propagate": a NaN reward makes its group NaN; "omit": it has no part in any statistic, a row whose
            rewards are all NaN gets 0, and a sum over functions goes over those that are not NaN.
        singles: a group of one row gives 0 ("zero") or its reward over 1 + eps ("keep", as verl does; over the batch's
            scale with "batch_std"). It is not asked where neither baseline nor scale is the group's: baseline="none"
            with scale "none", "mean" or "batch_std".
        whitening: a `Whitening` of the advantages over the whole batch. Rows without an advantage are left out: masked
            ones, unscored ones under "omit", and one that is alone where the others' mean is its baseline.
        lengths: int64 [N], not negative, tokens of each completion: the whitening's statistics go over tokens. None:
            over rows.
        backend: None, "eager" or "triton"; None is "triton" on a GPU up to float32, or under TRITON_INTERPRET=1.

    Returns:
        advantages [N] in the dtype of `rewards`. Differentiable once in `rewards`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range, by name; an empty batch; a group_size that
            does not divide N; not exactly one of group_size, group_ids and offsets; a backend that cannot be used.
    """
    require_tensor(rewards, "rewards")
    if rewards.dim() not in (1, 2) or not rewards.is_floating_point() or rewards.numel() == 0:
        raise ValueError(
            f"rewards must be a non-empty floating-point [N] or [N, R], got {rewards.dtype} of shape "
            f"{tuple(rewards.shape)}"
        )
    count, functions = rewards.shape[0], rewards.shape[1] if rewards.dim() == 2 else 1
    require_choice(baseline, ("mean", "leave_one_out", "none"), "baseline")
    require_choice(scale, ("std", "batch_std", "mean", "none"), "scale")
    require_choice(aggregation, ("sum_then_normalize", "normalize_then_sum"), "aggregation")
    require_choice(nan_policy, ("propagate", "omit"), "nan_policy")
    require_choice(singles, ("zero", "keep"), "singles")
    require_integer(ddof, "ddof", least=0)
    require_number(eps, "eps", least=0)
    if whitening is not None and not isinstance(whitening, Whitening):
        raise TypeError(f"whitening must be a Whitening or None, got {whitening!r}")
    if lengths is not None and whitening is None:
        raise ValueError("lengths are read only with a whitening")
    if mask is not None:
        require_mask(mask, (count,), "mask", "[N]")
        require_same_device("mask", mask, "rewards", rewards)
    if reward_weights is not None:
        require_floating(reward_weights, "reward_weights")
        require_shape(reward_weights, (functions,), "reward_weights", "[R]")
        require_same_device("reward_weights", reward_weights, "rewards", rewards)
    if lengths is not None:
        require_ids(lengths, "lengths")
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lengths < 0).any()):
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        require_shape(lengths, (count,), "lengths", "[N]")
        require_same_device("lengths", lengths, "rewards", rewards)
    groups = _group_layout(rewards, group_size, group_ids, offsets)
    options = advantages.Options(
        baseline, scale, ddof, float(eps), singles, nan_policy == "omit", aggregation == "normalize_then_sum",
        whitening, choose_backend(backend, rewards),
    )  # fmt: skip
    columns = rewards if rewards.dim() == 2 else rewards[:, None]
    return advantages.compute(columns, groups, options, mask, reward_weights, lengths)


def _group_layout(
    rewards: Tensor, group_size: int | None, group_ids: Tensor | None, offsets: Tensor | None
) -> advantages.Groups:
    count = rewards.shape[0]
    if sum(x is not None for x in (group_size, group_ids, offsets)) != 1:
        raise ValueError("exactly one of group_size, group_ids and offsets must be given")
    if group_size is not None:
        require_integer(group_size, "group_size")
        if group_size < 1 or count % group_size:
            raise ValueError(f"group_size must divide the {count} rewards, got {group_size}")
        return advantages.Groups(None, None, group_size)
    if group_ids is not None:
        require_ids(group_ids, "group_ids")
        require_shape(group_ids, (count,), "group_ids", "[N]")
        require_same_device("group_ids", group_ids, "rewards", rewards)
        return advantages.Groups.of_labels(group_ids)
    assert offsets is not None
    require_ids(offsets, "offsets")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be [G + 1] with G >= 1, got shape {tuple(offsets.shape)}")
    require_same_device("offsets", offsets, "rewards", rewards)
    if not torch.compiler.is_compiling():
        reference.require_offsets(offsets, count)
    return advantages.Groups(None, offsets, 1)


@overload
def selective_log_softmax(
    logits: Tensor, ids: Tensor, *, temperature: float = ..., return_entropy: Literal[False] = ...,
    in_place_backward: bool = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_log_softmax(
    logits: Tensor, ids: Tensor, *, temperature: float = ..., return_entropy: Literal[True],
    in_place_backward: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    in_place_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-softmax of logits / temperature at the given ids, and the entropy, in one pass and without a second [N, V].

    Args:
        logits: [..., V], floating point, of any strides: logits[:, :-1] of [B, T, V] is not copied.
        ids: int64 [...] or [..., k] over the rows of logits, values in [0, V).
        temperature: tau > 0.
        return_entropy: also return the entropy of each row, in nats.
        in_place_backward: the gradient is written over the logits, which nothing may read after the backward pass
            (torch raises where its autograd would). Not taken under torch.compile, which plans memory itself.
        backend: None, "eager" or "triton"; None is "triton" on a GPU up to float32, or under TRITON_INTERPRET=1.

    Returns:
        log-probabilities of the shape of `ids`, float32 (float64 for float64 logits), and with `return_entropy` a pair
        with the entropy [...]. Differentiable once in `logits`; the gradient is in the dtype of `logits`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range, by name; an empty batch; ids out of range
            (checked on the CPU; on a GPU they give NaN); a backend that cannot be used.
    """
    require_tensor(logits, "logits")
    require_ids(ids, "ids")
    if logits.dim() < 1 or not logits.is_floating_point() or logits.numel() == 0:
        raise ValueError(
            f"logits must be a non-empty floating-point [..., V], got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    lead = logits.shape[:-1]
    many = ids.dim() == logits.dim()
    if ids.numel() == 0 or (ids.shape[:-1] if many else ids.shape) != lead:
        raise ValueError(f"ids must be {(*lead,)} or {(*lead, 'k')} for these logits, got shape {tuple(ids.shape)}")
    require_same_device("ids", ids, "logits", logits)
    require_positive(temperature, "temperature")
    require_flag(return_entropy, "return_entropy")
    require_flag(in_place_backward, "in_place_backward")
    rows = logits[(None,) * (3 - logits.dim())] if logits.dim() < 3 else logits.flatten(0, -3)  # [b, t, V]
    columns = ids.reshape(-1, ids.shape[-1] if many else 1)
    in_place = in_place_backward and not torch.compiler.is_compiling()
    if in_place and _overlaps(logits):
        raise ValueError(
            f"in_place_backward needs logits whose elements lie apart, got strides {logits.stride()}: an expanded view?"
        )
    k = columns.shape[1]
    unsupported = f"the kernel takes at most {_MAX_IDS} ids a row, got {k}" if k > _MAX_IDS else None
    logprobs, entropy, _ = ops.selective_log_softmax(
        rows, columns, temperature, return_entropy, in_place, choose_backend(backend, logits, unsupported)
    )
    logprobs = logprobs.view(ids.shape)
    return (logprobs, entropy.view(lead)) if return_entropy else logprobs


_MAX_K = 32  # of the kernel of mix_embeddings
_MAX_IDS = 8192  # of the kernel of selective_log_softmax


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
