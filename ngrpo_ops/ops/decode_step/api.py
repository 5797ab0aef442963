"""The public functions of a decode step and their registration with torch."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ...config import Variant
from ...strategies import Strategy, get_strategy, strategy_names
from .._checks import require_embedding, require_flag, require_same_device
from .._library import HostReadingOperation, choose_backend, load_kernels
from . import reference
from .outputs import DecodeStep, MixingCandidates
from .settings import Settings, resolve, unsupported_by_kernel


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
    strategy: str = "neighbor",
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
        embedding: the input table E [V, d]. None where the model embeds ids and weights by itself: embeddings is then
            [B, 0].
        neighbor_ids: int64 [V, k - 1], the neighbors of every token (`NeighborTable.ids`), for strategy "neighbor";
            [V, 0] is k = 1.
        mixing_rate: probability rho that a row is mixed at this step.
        temperature: tau >= 0, for all rows or [B]. Sample, weights and log-probabilities use logits / tau. 0 is greedy:
            such a row emits its argmax, and its weights and log-probabilities are those of tau = 1.
        top_k: the first filter of the *sampled* distribution, for all rows or int64 [B]; below 1 and None filter
            nothing. Equal logits are kept by the lower id. The weights, the log-probabilities and the entropy do not
            see the filters.
        top_p: the second filter, for all rows or [B]; 1 and None filter nothing.
        min_p: the third filter, relative to the largest probability, for all rows or [B]; 0 and None filter nothing.
        seed: int or 0-d int64 tensor. Gate, sample and noise depend on seed, step and row id alone: a Philox generator
            is keyed by the three, and torch's generators are not touched. Tensors on the GPU are read there, so that a
            captured CUDA graph goes on with what they then hold.
        step: int, 0-d int64 tensor, or int64 [B] on the device of the logits, for rows at steps of their own.
        row_ids: int64 [B]; None: 0 .. B - 1.
        enabled: bool [B]. A row that is False (ended, past its stop token, being evaluated) is sampled and not mixed.
        strategy: the candidates and their weights, see `MixingConfig`: "neighbor"; "topk", "gumbel", "gaussian" and
            "moi", over the k most likely tokens; "multiplex", k draws; "anchor", k = 1; or a registered strategy of
            your own. Only "neighbor" reads `neighbor_ids`.
        k: candidates of a row, the emitted one counted, for all strategies but "neighbor" and "anchor".
        mixing_temperature: tau of the weights alone; None: `temperature`.
        noise_scale: of "gaussian": the noise's size over the mix's own (root mean square). None: 0.33.
        moi_beta: of "moi": beta >= 0. None: 1.
        entropy_threshold: a row is mixed only where the entropy of softmax(logits / tau), in nats, is at least this.
            The gate is then the rate's and the entropy's; with mixing_rate=1 it is the entropy's alone.
        variant: weights of the "paper", or "released": those that the published code really applies.
        backend: None, "eager" or "triton". None is "triton" on a GPU for k <= 32 and up to float32, or under
            TRITON_INTERPRET=1. A strategy of your own is "eager".

    Returns:
        DecodeStep: token_ids [B] int64; gate [B] bool; ids [B, k] int64; weights [B, k] float32; embeddings [B, d] in
        E's dtype; logprobs [B] float32; entropy [B] float32; fault [B] int32. Not differentiable.

        ids[:, 0] is the argmax (for "gumbel" the argmax of the noised logits, for "moi" and "multiplex" the sample).
        ids and weights are valid on every row. Gated rows emit ids[:, 0] and embed the mix, the others emit the sample
        and embed E[sample]. logprobs is the log-softmax of logits / tau at the emitted token, before the filters.

        fault is not 0 for a row whose logits hold NaN or +inf or are all -inf, whose anchor's neighbors are not tokens,
        or whose strategy broke its promise. Such a row is not gated, emits token 0, and has NaN for all that is
        floating point. Nothing is raised here, which would make the host wait at every step: collect the faults and
        give them to `raise_faults`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range, by name; tables of another vocabulary; a
            setting that the strategy would not read; a backend that cannot be used.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import decode_step
        >>> logits = torch.tensor([[0.0, 4.0, 3.0], [9.0, 0.0, 0.0]])
        >>> neighbor_ids = torch.tensor([[1], [2], [1]])
        >>> step = decode_step(logits, torch.eye(3), neighbor_ids, mixing_rate=1.0, seed=0, step=0)
        >>> step.token_ids.tolist(), step.ids.tolist()
        ([1, 0], [[1, 2], [0, 1]])
        >>> torch.equal(step.embeddings[0, 1:], step.weights[0])
        True
    """
    settings, entry = resolve(
        logits, {"noise_scale": noise_scale, "moi_beta": moi_beta}, neighbor_ids=neighbor_ids, k=k, strategy=strategy,
        variant=variant, temperature=temperature, mixing_temperature=mixing_temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, seed=seed, step=step, row_ids=row_ids, mixing_rate=mixing_rate,
        entropy_threshold=entropy_threshold, enabled=enabled,
    )  # fmt: skip
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
    backend = _backend(backend, logits, settings, entry)
    return DecodeStep(*_decode_step(logits.detach(), embedding.detach(), *settings, backend))


def mixing_candidates(
    logits: Tensor,
    neighbor_ids: Tensor | None = None,
    *,
    strategy: str = "neighbor",
    k: int | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    mixing_temperature: float | None = None,
    noise_scale: float | None = None,
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
        logits: as in `decode_step`.
        neighbor_ids: as in `decode_step`.
        strategy: as in `decode_step`.
        k: as in `decode_step`.
        temperature: as in `decode_step`.
        top_k: a filter of what "moi", "multiplex" and strategies of your own draw from; for these alone.
        top_p: another, as `top_k`.
        min_p: another, as `top_k`.
        mixing_temperature: as in `decode_step`.
        noise_scale: as in `decode_step`. Nothing is mixed here, so only a strategy of your own may read it.
        moi_beta: as in `decode_step`.
        variant: as in `decode_step`.
        seed: as in `decode_step`. "gumbel", "moi", "multiplex" and strategies of your own draw by seed and step.
        step: as in `decode_step`.
        row_ids: as in `decode_step`.
        return_entropy: also return the entropy of softmax(logits / temperature), for a gate by entropy.
        backend: as in `decode_step`.

    Returns:
        MixingCandidates: ids [B, k] int64, the first the one that a mixed step emits; weights [B, k] float32; fault [B]
        int32; entropy [B] float32, in nats, or None. Not differentiable.

    Raises:
        TypeError, ValueError: as `decode_step`.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import mixing_candidates
        >>> found = mixing_candidates(torch.tensor([[0.0, 4.0, 3.0]]), strategy="topk", k=2)
        >>> found.ids.tolist(), [round(weight, 3) for weight in found.weights[0].tolist()]
        ([[1, 2]], [0.731, 0.269])
    """
    settings, entry = resolve(
        logits, {"noise_scale": noise_scale, "moi_beta": moi_beta}, neighbor_ids=neighbor_ids, k=k, strategy=strategy,
        variant=variant, temperature=temperature, mixing_temperature=mixing_temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, seed=seed, step=step, row_ids=row_ids,
    )  # fmt: skip
    require_flag(return_entropy, "return_entropy")
    for name, value in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        if value is not None and not entry.reads_filters:
            drawing = tuple(other for other in strategy_names() if get_strategy(other).reads_filters)
            raise ValueError(
                f"{name} is read by the strategies {drawing}, which draw, alone, got strategy {strategy!r}"
            )
    backend = _backend(backend, logits, settings, entry)
    ids, weights, entropy, fault = _mixing_candidates(logits.detach(), *settings, return_entropy, backend)
    return MixingCandidates(ids, weights, fault, entropy if return_entropy else None)


def _backend(backend: str | None, logits: Tensor, settings: Settings, strategy: Strategy) -> str:
    chosen = choose_backend(backend, logits, unsupported_by_kernel(settings, strategy))
    if backend is None and logits.is_cuda and not strategy.has_kernel and not torch.compiler.is_compiling():
        _say_no_kernel(strategy.name)
    return chosen


@functools.cache
def _say_no_kernel(strategy: str) -> None:
    warnings.warn(f"strategy {strategy!r} has no kernel: its steps run as plain torch on the GPU", stacklevel=4)


@HostReadingOperation
def _decode_step(
    logits: Tensor, embedding: Tensor, settings: Settings, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        return load_kernels("decode_step").decode_step(logits, embedding, settings)
    step = reference.decode_step_cpu if logits.device.type == "cpu" else reference.decode_step
    return step(logits, embedding, settings)


@_decode_step.register_fake
def _(
    logits: Tensor, embedding: Tensor, neighbor_ids: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, k, dtype=torch.float32),
        embedding.new_empty(rows, embedding.shape[1]),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
    )


@HostReadingOperation
def _mixing_candidates(
    logits: Tensor, settings: Settings, return_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        return load_kernels("decode_step").mixing_candidates(logits, settings, return_entropy)
    return reference.mixing_candidates(logits, settings, return_entropy)


@_mixing_candidates.register_fake
def _(logits: Tensor, neighbor_ids: Tensor | None, k: int, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, return_entropy = logits.shape[0], rest[-2]
    return (
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, k, dtype=torch.float32),
        logits.new_empty(rows if return_entropy else 0, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
    )
