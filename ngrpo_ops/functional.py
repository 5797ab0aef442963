"""The public functions: what they compute, what they accept, and the checks; the arithmetic is behind `ops`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from . import _operations as ops
from . import decoding, reference, sharded
from .config import DRAWING, MOI_BETA, NOISE_SCALE, OWN_WEIGHTS, Metric, Strategy, Variant
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


class DecodeStep(NamedTuple):
    """What one decode step leaves behind; see `decode_step`."""

    token_ids: Tensor
    gate: Tensor
    ids: Tensor
    weights: Tensor
    embeddings: Tensor
    logprobs: Tensor
    entropy: Tensor
    fault: Tensor


class MixingCandidates(NamedTuple):
    """What a step of each row would mix; see `mixing_candidates`."""

    ids: Tensor
    weights: Tensor
    fault: Tensor
    entropy: Tensor | None


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


def candidate_weights(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, variant: Variant = "paper") -> Tensor:
    """Weights of the candidates: a softmax of logits / temperature over the candidates alone (equation 9).

    Args:
        logits: [..., V], floating point; computed in float32 (float64 for float64).
        ids: int64 [..., k], the candidates of each row.
        temperature: tau > 0.
        variant: "released" applies what the published code does: the softmax over the candidates' probabilities.

    Returns:
        weights [..., k], float32 (float64 for float64 logits); each row sums to 1. Differentiable in `logits`.

    Raises:
        TypeError: ids that are not int64. ValueError: shapes that do not fit, temperature <= 0, an unknown variant.
    """
    require_tensor(logits, "logits")
    require_ids(ids, "ids")
    require_same_device("ids", ids, "logits", logits)
    if ids.dim() != logits.dim() or ids.shape[:-1] != logits.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"ids must be [..., k >= 1] over the rows of logits {tuple(logits.shape)}, got {tuple(ids.shape)}"
        )
    require_positive(temperature, "temperature")
    require_choice(variant, get_args(Variant), "variant")
    return decoding.candidate_weights(logits, ids, temperature, variant)


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


def mixing_candidates(
    logits: Tensor,
    neighbor_ids: Tensor | None = None,
    *,
    strategy: Strategy = "neighbor",
    k: int | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    mixing_temperature: float | None = None,
    moi_beta: float | None = None,
    variant: Variant = "paper",
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> MixingCandidates:
    """What a step would mix, for a trainer or an engine that samples by itself: `decode_step` without gate and sample.

    Args:
        logits, neighbor_ids, strategy, k, temperature, mixing_temperature, moi_beta, variant, seed, step, row_ids,
            backend: as in `decode_step`. seed, step and row_ids are what "gumbel", "moi" and "multiplex" draw by; no
            other strategy reads them.
        top_k, top_p, min_p: cut what "moi" and "multiplex" draw from, as in `decode_step`; for these alone.
        return_entropy: also return the entropy of softmax(logits / temperature), for a gate by entropy.

    Returns:
        MixingCandidates: ids [B, k] int64, the first the one that a mixed step emits; weights [B, k] float32; fault [B]
        int32; entropy [B] float32, in nats, or None. Not differentiable.

    Raises:
        TypeError, ValueError: as `decode_step`.
    """
    batch = _require_logits(logits)
    k = _require_strategy(logits, neighbor_ids, strategy, k, variant, mixing_temperature)
    require_flag(return_entropy, "return_entropy")
    for name, cut in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        if cut is not None and strategy not in DRAWING:
            raise ValueError(
                f"{name} is read by the strategies {DRAWING}, which draw, alone, got strategy {strategy!r}"
            )
    ids, weights, entropy, fault = ops.mixing_candidates(
        logits.detach(), neighbor_ids, k, strategy, variant, _temperature(temperature, logits),
        mixing_temperature, _moi_beta(moi_beta, strategy), _cut(top_k, "top_k", logits), _cut(top_p, "top_p", logits),
        _cut(min_p, "min_p", logits), _counter(seed, "seed", "logits", logits), _step(step, batch, logits),
        _require_rows(row_ids, batch, logits), return_entropy,
        choose_backend(backend, logits, _unsupported_step(k, variant, mixing_temperature)),
    )  # fmt: skip
    return MixingCandidates(ids, weights, fault, entropy if return_entropy else None)


def decode_step(
    logits: Tensor,
    embedding: Tensor | None,
    neighbor_ids: Tensor | None = None,
    *,
    mixing_rate: float = 0.1,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor,
    step: int | Tensor,
    row_ids: Tensor | None = None,
    enabled: Tensor | None = None,
    strategy: Strategy = "neighbor",
    k: int | None = None,
    mixing_temperature: float | None = None,
    noise_scale: float | None = None,
    moi_beta: float | None = None,
    entropy_threshold: float | None = None,
    variant: Variant = "paper",
    backend: str | None = None,
) -> DecodeStep:
    """One decode step of an N-GRPO rollout: sample, anchor, gate, weights, mix (section 3, equations 2 to 10).

    Args:
        logits: [B, V], floating point, any strides.
        embedding: the input table E [V, d]; None where the model embeds ids and weights by itself: embeddings is then
            [B, 0].
        neighbor_ids: int64 [V, k - 1], the neighbours of every token (`NeighborTable.ids`), for strategy "neighbor";
            [V, 0] is k = 1.
        mixing_rate: probability rho that a row is mixed at this step.
        temperature: tau >= 0, for all rows or [B]; sample, weights and log-probabilities use logits / tau. 0 is greedy:
            such a row emits its argmax, and its weights and log-probabilities are those of tau = 1.
        top_k, top_p, min_p: cut the *sampled* distribution, in this order, for all rows or [B] (int64 for top_k; below
            1, 1 and 0 are no cut); equal logits are kept by the lower id. The weights, the log-probabilities and the
            entropy do not see them. min_p is relative to the largest probability. None: no cut.
        seed, step: int or 0-d int64 tensor; step also [B], on the device of the logits, for rows at steps of their own.
            With `row_ids` int64 [B] (default 0 .. B - 1) they are all that gate, sample and noise depend on: a Philox
            generator keyed (seed, row id, step). torch's generators are not touched. As tensors on the GPU they are
            read there: a captured CUDA graph goes on with what they then hold.
        enabled: bool [B]; a row that is False (ended, past its stop token, being evaluated) is sampled and not mixed.
        strategy: the candidates and their weights, see `MixingConfig`: "neighbor"; "topk", "gumbel", "gaussian" and
            "moi", over the k most likely tokens; "multiplex", k draws; or "anchor", k = 1. Only "neighbor" reads
            `neighbor_ids`.
        k: candidates of a row, the one emitted counted, for all but "neighbor" and "anchor".
        mixing_temperature: tau of the weights alone; None: `temperature`.
        noise_scale: of "gaussian": the noise's size over the mix's own (root mean square). None: 0.33.
        moi_beta: of "moi": beta >= 0. None: 1.
        entropy_threshold: a row is mixed only where the entropy of softmax(logits / tau), in nats, is at least this.
            The gate is then the rate's and the entropy's; with mixing_rate=1 the entropy's alone.
        variant: weights of the "paper", or "released": those the published code really applies.
        backend: None, "eager" or "triton"; None is "triton" on a GPU for k <= 32 and up to float32, or under
            TRITON_INTERPRET=1.

    Returns:
        DecodeStep: token_ids [B] int64; gate [B] bool; ids [B, k] int64, ids[:, 0] being the argmax (for "gumbel" that
        of the noised logits, for "moi" and "multiplex" the sample); weights [B, k] float32; embeddings [B, d] in E's
        dtype; logprobs [B] float32; entropy [B] float32; fault [B] int32. ids and weights are valid on every row: gated
        rows emit ids[:, 0] and embed the mix, the others emit the sample and embed E[sample]. logprobs: log-softmax of
        logits / tau at the emitted token, before the cuts. Not differentiable.

        fault is 0, or not 0 for a row whose logits hold NaN or +inf, or are all -inf, or whose anchor's neighbours are
        not tokens. Such a row is not gated, emits token 0, and has NaN for all that is floating point. Nothing is
        raised here, which would make the host wait at every step: collect the faults and give them to `raise_faults`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range, by name; tables of another vocabulary; a
            setting that the strategy would not read; a backend that cannot be used.
    """
    batch = _require_logits(logits)
    if embedding is None:
        embedding = logits.new_empty(logits.shape[1], 0)
    else:
        require_embedding(embedding)
    if embedding.shape[0] != logits.shape[1]:
        raise ValueError(
            f"embedding has {embedding.shape[0]} rows but logits {logits.shape[1]} columns: two vocabularies that "
            "differ"
        )
    require_same_device("embedding", embedding, "logits", logits)
    k = _require_strategy(logits, neighbor_ids, strategy, k, variant, mixing_temperature)
    require_number(mixing_rate, "mixing_rate", least=0)
    if not mixing_rate <= 1.0:
        raise ValueError(f"mixing_rate must be within [0, 1], got {mixing_rate!r}")
    if noise_scale is not None:
        require_number(noise_scale, "noise_scale", least=0)
        if strategy != "gaussian":
            raise ValueError(f"noise_scale is read by strategy 'gaussian' alone, got {noise_scale} with {strategy!r}")
    if entropy_threshold is not None:
        require_number(entropy_threshold, "entropy_threshold", least=0)
    if enabled is not None:
        require_mask(enabled, (batch,), "enabled", "[B]")
        require_same_device("enabled", enabled, "logits", logits)
    out = ops.decode_step(
        logits.detach(), embedding.detach(), neighbor_ids, k, strategy, variant, mixing_rate, entropy_threshold,
        NOISE_SCALE if noise_scale is None else noise_scale, _temperature(temperature, logits), mixing_temperature,
        _moi_beta(moi_beta, strategy), _cut(top_k, "top_k", logits), _cut(top_p, "top_p", logits),
        _cut(min_p, "min_p", logits), _counter(seed, "seed", "logits", logits), _step(step, batch, logits),
        _require_rows(row_ids, batch, logits), enabled,
        choose_backend(backend, logits, _unsupported_step(k, variant, mixing_temperature)),
    )  # fmt: skip
    return DecodeStep(*out)


def gaussian_noise(
    mixed: Tensor,
    noise_scale: float | Tensor,
    *,
    seed: int | Tensor,
    row_ids: Tensor,
    steps: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Mixed embeddings with the noise of strategy "gaussian" (STHT, arXiv 2509.19170), drawn again from its counters.

    Args:
        mixed: [M, d], floating point, of `mix_embeddings`.
        noise_scale: the noise's size over that of each row of `mixed` (root mean square), for all rows or [M].
        seed: int or int64, 0-d or [M]. row_ids, steps: int64 [M]. As they were in the decode step.
        backend: None, "eager" or "triton".

    Returns:
        [M, d] in the dtype of `mixed`: mixed + noise. Differentiable in `mixed`, the noise being a constant.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape, by name; a backend that cannot be used.
    """
    require_floating(mixed, "mixed")
    if mixed.dim() != 2:
        raise ValueError(f"mixed must be [M, d], got shape {tuple(mixed.shape)}")
    rows = mixed.shape[:1]
    for name, tensor in (("row_ids", row_ids), ("steps", steps)):
        require_ids(tensor, name)
        require_shape(tensor, tuple(rows), name, "[M]")
        require_same_device(name, tensor, "mixed", mixed)
    if isinstance(noise_scale, Tensor):
        require_floating(noise_scale, "noise_scale")
        require_shape(noise_scale, tuple(rows), "noise_scale", "[M]")
        require_same_device("noise_scale", noise_scale, "mixed", mixed)
    else:
        require_number(noise_scale, "noise_scale", least=0)
        noise_scale = torch.full(rows, noise_scale, dtype=torch.float32, device=mixed.device)
    if not isinstance(seed, Tensor) or seed.dim() == 0:
        seed = _counter(seed, "seed", "mixed", mixed).to(mixed.device).expand(rows)
    require_ids(seed, "seed")
    require_shape(seed, tuple(rows), "seed", "[M]")
    require_same_device("seed", seed, "mixed", mixed)
    if not mixed.numel():
        return mixed
    noise = ops.gaussian_noise(mixed.detach(), noise_scale, seed, row_ids, steps, choose_backend(backend, mixed))
    return (mixed.to(noise.dtype) + noise).to(mixed.dtype)


def raise_faults(fault: Tensor, *, row_ids: Tensor | None = None) -> None:
    """Raises if a decode step met logits that nothing can be sampled from. Reads `fault` once: the host waits here.

    Args:
        fault: int32 [B] or [B, T], the faults of one step or of all steps of a generation.
        row_ids: int64 [B], to name the rows by; None: their place.

    Raises:
        RuntimeError: the first faulty row and step of those there are, and what is wrong with it.
    """
    require_tensor(fault, "fault")
    steps = fault[:, None] if fault.dim() == 1 else fault
    faulty = steps.nonzero().tolist()
    if not faulty:
        return
    row, step = min(faulty, key=lambda place: place[::-1])
    reasons = "; ".join(text for bit, text in decoding.FAULTS.items() if int(steps[row, step]) & bit)
    where = f"row {row if row_ids is None else int(row_ids[row])}" + (f", step {step}" if fault.dim() == 2 else "")
    more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
    raise RuntimeError(f"nothing could be sampled at {where}{more}: {reasons}")


def _require_logits(logits: Tensor) -> int:
    """B of logits [B, V]."""
    require_tensor(logits, "logits")
    if logits.dim() != 2 or not logits.is_floating_point() or logits.numel() == 0:
        raise ValueError(
            f"logits must be a non-empty floating-point [B, V], got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    return logits.shape[0]


def _require_strategy(
    logits: Tensor,
    neighbor_ids: Tensor | None,
    strategy: str,
    k: int | None,
    variant: str,
    mixing_temperature: float | None,
) -> int:
    """The number of candidates."""
    vocabulary = logits.shape[1]
    require_choice(strategy, get_args(Strategy), "strategy")
    require_choice(variant, get_args(Variant), "variant")
    if mixing_temperature is not None:
        require_positive(mixing_temperature, "mixing_temperature")
    if strategy in OWN_WEIGHTS and variant == "released":
        raise ValueError(f"variant='released' has no strategy {strategy!r}, whose weights are its own")
    if strategy == "neighbor":
        if neighbor_ids is None:
            raise ValueError("neighbor_ids must be given for strategy 'neighbor'; got None")
        require_ids(neighbor_ids, "neighbor_ids")
        if neighbor_ids.dim() != 2 or neighbor_ids.shape[0] != vocabulary:
            raise ValueError(f"neighbor_ids must be [V = {vocabulary}, k - 1], got shape {tuple(neighbor_ids.shape)}")
        require_same_device("neighbor_ids", neighbor_ids, "logits", logits)
        if k is not None and k != neighbor_ids.shape[1] + 1:
            raise ValueError(f"k must be neighbor_ids' columns and 1 = {neighbor_ids.shape[1] + 1}, got {k!r}")
        return neighbor_ids.shape[1] + 1
    if neighbor_ids is not None:
        raise ValueError(f"neighbor_ids are read by strategy 'neighbor' alone, got strategy {strategy!r}")
    if strategy == "anchor":
        if k not in (None, 1):
            raise ValueError(f"k must be 1 for strategy 'anchor', got {k!r}")
        return 1
    require_integer(k, "k")
    assert k is not None
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be within [1, V = {vocabulary}], got {k}")
    return k


def _moi_beta(moi_beta: float | None, strategy: str) -> float:
    if moi_beta is None:
        return MOI_BETA
    require_number(moi_beta, "moi_beta", least=0)
    if strategy != "moi":
        raise ValueError(f"moi_beta is read by strategy 'moi' alone, got {moi_beta} with {strategy!r}")
    return moi_beta


def _unsupported_step(k: int, variant: str, mixing_temperature: float | None) -> str | None:
    if k > _MAX_K:
        return f"the kernel takes k <= {_MAX_K}, got {k}"
    if variant == "released" and mixing_temperature is not None:
        return "the kernel has the 'released' weights at the sampling temperature only"
    return None


def _temperature(value: float | Tensor, logits: Tensor) -> Tensor:
    return _setting(value, "temperature", 0.0, math.inf, logits)


def _cut(value: float | Tensor | None, name: str, logits: Tensor) -> Tensor | None:
    """top_k, top_p or min_p, [B] or 0-d on the CPU."""
    if value is None:
        return None
    if name == "top_k":
        if isinstance(value, Tensor):
            require_ids(value, name)
            require_shape(value, (logits.shape[0],), name, "[B]")
            require_same_device(name, value, "logits", logits)
            return value
        require_integer(value, name, least=1)
        return torch.full((), value, dtype=torch.int64)
    return _setting(value, name, 0.0, 1.0, logits, open_below=name == "top_p")


def _setting(
    value: float | Tensor, name: str, least: float, most: float, logits: Tensor, *, open_below: bool = False
) -> Tensor:
    """A floating-point setting, [B] where it differs from row to row and 0-d on the CPU where it does not. The values
    of a tensor are looked at where that does not make the host wait."""
    if isinstance(value, Tensor):
        require_floating(value, name)
        require_shape(value, (logits.shape[0],), name, "[B]")
        require_same_device(name, value, "logits", logits)
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value
        low, high = (float(x) for x in value.aminmax())
    else:
        require_number(value, name, least=least)
        low = high = value
    if not (least <= low and high <= most) or (open_below and low == least) or high == math.inf:
        bounds = f"{'(' if open_below else '['}{least:g}, {most:g}{')' if most == math.inf else ']'}"
        raise ValueError(f"{name} must be within {bounds}, got {low if low == high else (low, high)!r}")
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64)


def _require_rows(row_ids: Tensor | None, batch: int, logits: Tensor) -> Tensor | None:
    if row_ids is not None:
        require_ids(row_ids, "row_ids")
        require_shape(row_ids, (batch,), "row_ids", "[B]")
        require_same_device("row_ids", row_ids, "logits", logits)
    return row_ids


def _step(step: int | Tensor, batch: int, logits: Tensor) -> Tensor:
    """0-d, or [B]: rows at steps of their own."""
    if not isinstance(step, Tensor) or not step.dim():
        return _counter(step, "step", "logits", logits)
    require_ids(step, "step")
    require_shape(step, (batch,), "step", "0-d or [B]")
    require_same_device("step", step, "logits", logits)
    return step


def _counter(value: int | Tensor, name: str, other: str, tensor: Tensor) -> Tensor:
    """A seed or step as a 0-d tensor: on the CPU, where a Python number's is, with no copy to a GPU, or where `tensor`,
    the argument `other`, is."""
    if isinstance(value, Tensor):
        require_ids(value, name)
        require_shape(value, (), name, "0-d")
        if value.device.type != "cpu":
            require_same_device(name, value, other, tensor)
        return value
    require_integer(value, name)
    return torch.full((), value, dtype=torch.int64)


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
