"""What ours is compared with: other packages' own functions, or the strongest plain-torch way, written as its users
would write it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

#: Shown beside ours, but not the same function: they do not count as the best peer.
NOT_THE_SAME = (
    "an empty launch",
    "an empty operation",
    "F.embedding_bag, weights of 8 bits",
    "softmax + multinomial, no mixing",
    "transformers' warpers + multinomial, no mixing",
    "plain generate",
    "plain engine",
    "mixing engine, plain requests",
    "stock server",
    "mixing server, plain requests",
)


def tiled_matmul_topk(embedding: Tensor, queries: Tensor, k: int, tile: int = 8192) -> Tensor:
    """ids [Q, k] of the nearest rows by cosine, the query dropped: normalize, multiply tile by tile, topk, merge."""
    normal = torch.nn.functional.normalize(embedding, dim=1)
    wanted = normal[queries]
    values, ids = wanted.new_empty(len(queries), 0), queries.new_empty(len(queries), 0)
    for start in range(0, embedding.shape[0], tile):
        v, i = (wanted @ normal[start : start + tile].T).topk(k + 1, dim=1)
        values, ids = torch.cat([values, v], dim=1), torch.cat([ids, i + start], dim=1)
        values, order = values.topk(k + 1, dim=1)
        ids = ids.gather(1, order)
    return ids[:, 1:]


def faiss_index(embedding: Tensor, queries: Tensor, k: int) -> Callable[[], Tensor]:
    """faiss-cpu's exact search by inner product, its index filled beforehand; the query itself dropped."""
    import faiss

    normal = torch.nn.functional.normalize(embedding, dim=1).numpy()
    index = faiss.IndexFlatIP(normal.shape[1])
    index.add(normal)
    wanted = normal[queries.numpy()]

    def run() -> Tensor:
        ids = torch.from_numpy(index.search(wanted, k + 1)[1])
        others = ids != queries[:, None]
        others[others.all(1), -1] = False
        return ids[others].view(-1, k)

    return run


def embedding_bag(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """torch's own; it wants the weights in the table's dtype, so a bfloat16 table gets weights of 8 bits."""
    return torch.nn.functional.embedding_bag(ids, embedding, per_sample_weights=weights.to(embedding.dtype), mode="sum")


def gather_einsum(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nk,nkd->nd", weights.to(embedding.dtype), embedding[ids])


def plain_mix(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = embedding[ids].float()
    return (weights[..., None] * rows).sum(1).to(embedding.dtype)


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """torch.compile of a plain formula; its compiler for the CPU is the system's."""
    if not args[0].is_cuda and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile for the CPU needs a C++ compiler")
    fast = torch.compile(function)
    return lambda: fast(*args)


def log_softmax_gather(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, ids[:, None])


def trl_selective_log_softmax(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """TRL's own function, on scaled logits as its trainer calls it."""
    trl = pytest.importorskip("trl.trainer.utils")
    return trl.selective_log_softmax(logits / temperature, ids)


def trl_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """The formula inside TRL's trainer, which has no function for it."""
    grouped = rewards.view(-1, group_size)
    mean = grouped.nanmean(1).repeat_interleave(group_size)
    std = grouped.std(1).repeat_interleave(group_size)
    return (rewards - mean) / (std + 1e-4)


def verl_loop(rewards: Tensor, labels: list[int]) -> Tensor:
    """verl's compute_grpo_outcome_advantage, or where verl is not installed the same way, row by row in Python."""
    try:
        import numpy as np
        from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    except ImportError:
        scores: dict[int, list[Tensor]] = defaultdict(list)
        for reward, label in zip(rewards, labels, strict=True):
            scores[label].append(reward)
        statistics = {label: (torch.stack(rows).mean(), torch.stack(rows).std()) for label, rows in scores.items()}
        out = rewards.clone()
        for i, label in enumerate(labels):
            mean, std = statistics[label]
            out[i] = (out[i] - mean) / (std + 1e-6)
        return out
    mask = torch.ones(len(rewards), 1)
    return compute_grpo_outcome_advantage(rewards[:, None].clone(), mask, np.asarray(labels))[0].squeeze(1)


def openrlhf_group_norm(rewards: Tensor, group_size: int) -> Tensor:
    """The formula of OpenRLHF's group_norm, which is inside its experience maker."""
    grouped = rewards.view(-1, group_size)
    return ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-9)).view(-1)


def plain_step(logits: Tensor, embedding: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What a sampler without mixing does."""
    tokens = torch.multinomial((logits.float() / temperature).softmax(-1), 1).squeeze(1)
    return tokens, embedding[tokens]


def warped_step(
    logits: Tensor, embedding: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The same after transformers' own top-k and top-p."""
    warpers = pytest.importorskip("transformers")
    scores = logits.float() / temperature
    for warper in (warpers.TopKLogitsWarper(top_k), warpers.TopPLogitsWarper(top_p)):
        scores = warper(None, scores)
    tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
    return tokens, embedding[tokens]


def mix_after_sampling(
    logits: Tensor, embedding: Tensor, neighbor_ids: Tensor, rate: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """A step with the neighbors looked up in a table, as plain torch, its random numbers torch's own."""
    scaled = logits.float() / temperature
    anchor = scaled.argmax(-1)
    return _mixed_step(scaled, embedding, anchor, neighbor_ids[anchor], rate)


def search_every_step(
    logits: Tensor, embedding: Tensor, normalized: Tensor, k: int, rate: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same with the neighbors of every row searched in the whole table at every step, as the published code does;
    but with the table normalized once, which that code does at every step."""
    scaled = logits.float() / temperature
    anchor = scaled.argmax(-1)
    similarity = (normalized[anchor] @ normalized.T).scatter_(1, anchor[:, None], -torch.inf)
    return _mixed_step(scaled, embedding, anchor, similarity.topk(k - 1).indices, rate)


def _mixed_step(
    scaled: Tensor, embedding: Tensor, anchor: Tensor, neighbors: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    sampled = torch.multinomial(scaled.softmax(-1), 1).squeeze(1)
    ids = torch.cat([anchor[:, None], neighbors], dim=1)
    weights = scaled.gather(1, ids).softmax(-1)
    mixed = torch.einsum("bk,bkd->bd", weights.to(embedding.dtype), embedding[ids])
    gate = torch.rand(len(ids), device=ids.device) < rate
    return torch.where(gate, anchor, sampled), torch.where(gate[:, None], mixed, embedding[sampled])
