"""The policy of a step as a strategy reads it: what the strategy asks for is computed once, and nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...random import gumbel, normal
from ...strategies import Strategy
from .._checks import require_ids_in_range, within
from .._precision import compute_dtype
from .._ties import likeliest
from ..candidate_weights import candidate_scores
from . import sampling
from .settings import Settings

# Of a user's strategy. The streams from 1 on belong to the noise on the mix.
_FIRST_STREAM = {"gumbel": 1 << 28, "normal": 1 << 29, "draws": 1 << 30}


class Policy:
    """The next-token distribution of B rows, and the random numbers of the step.

    B is the number of rows asked for, which may be the gated rows alone. All tensors are on the device of the logits.

    Attributes:
        k: the number of candidates.
        vocabulary: V.
        options: the strategy's options by name.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import mixing_candidates, register_strategy
        >>> @register_strategy("two draws")
        ... def two_draws(policy):
        ...     ids = torch.cat([policy.likeliest(1), policy.draws(1)], dim=1)
        ...     return ids, policy.softmax(ids)
        >>> found = mixing_candidates(torch.tensor([[0.0, 9.0, 0.0]]), strategy="two draws", k=2, seed=1, step=0)
        >>> found.ids[0, 0].item(), found.weights.sum().item()
        (1, 1.0)
    """

    def __init__(self, logits: Tensor, settings: Settings, strategy: Strategy) -> None:
        self._raw, self._settings, self._strategy = logits, settings, strategy
        self._drawn = logits.new_empty(logits.shape[0], 0)
        self.outside: Tensor | None = None  # rows with a neighbor outside the vocabulary, once neighbors() was called
        self.k, self.vocabulary = settings.k, logits.shape[1]
        self.options: Mapping[str, float] = strategy.named_options(settings.options)

    @functools.cached_property
    def counter(self) -> tuple[Tensor, Tensor, Tensor]:
        """seed, row ids and step, by which the rows draw."""
        return self._settings.counter(self._raw)

    # The distribution

    @functools.cached_property
    def logits(self) -> Tensor:
        """[B, V]: logits over the sampling temperature, before top-k, top-p and min-p, in the compute dtype."""
        return sampling.scaled_logits(self._raw, self._settings.temperature)

    @functools.cached_property
    def distribution(self) -> sampling.Distribution:
        """The parts of softmax(logits)."""
        return sampling.distribution(self._raw, self._settings.temperature)

    @property
    def entropy(self) -> Tensor:
        """[B]: the entropy of softmax(logits), in nats."""
        return self.distribution.entropy

    @property
    def normalized_entropy(self) -> Tensor:
        """[B]: the entropy over its largest possible value, log V."""
        return self.entropy.clamp(min=0) / max(math.log(self.vocabulary), 1e-9)

    @functools.cached_property
    def max_logit(self) -> Tensor:
        """[B, 1]: the largest logit over the sampling temperature. The logits are only looked through for it."""
        return self._raw.amax(-1, keepdim=True).to(self._dtype) / self._sampling_temperature

    def relative_logits(self, ids: Tensor) -> Tensor:
        """[B, n]: logits over the sampling temperature at ids [B, n], less the row's largest one."""
        return self._raw.gather(-1, ids).to(self._dtype) / self._sampling_temperature - self.max_logit

    # Candidates

    def neighbors(self) -> Tensor:
        """int64 [B, k]: the anchor, which is the argmax, and its k - 1 nearest neighbors, nearest first.

        Only for a strategy that is registered with `reads_neighbors=True`.
        """
        table = self._settings.neighbor_ids
        if table is None:
            raise ValueError(
                "policy.neighbors() needs a neighbor table: register the strategy with reads_neighbors=True"
            )
        anchor = self._raw.argmax(-1, keepdim=True)
        neighbors = table[anchor.squeeze(-1)]
        require_ids_in_range(neighbors, self.vocabulary, "neighbor_ids")
        if neighbors.device.type != "cpu":  # where these have not been looked at
            self.outside = (~within(neighbors, self.vocabulary)).any(-1)
            neighbors = neighbors.clamp(0, self.vocabulary - 1)
        return torch.cat([anchor, neighbors], dim=-1)

    def likeliest(self, n: int) -> Tensor:
        """int64 [B, n]: the n most likely tokens, likeliest first, equal ones by the lower id.

        Where a row has fewer tokens above probability 0, the first one stands for those that are missing.
        """
        return likeliest(self._raw, n)

    def draws(self, n: int) -> Tensor:
        """int64 [B, n]: independent draws from what top-k, top-p and min-p leave. The first is the row's sample.

        A greedy row draws its argmax. Only for a strategy that is registered with `reads_filters=True`, the default.
        """
        if not self._strategy.reads_filters:
            raise ValueError("policy.draws() reads the filters: register the strategy with reads_filters=True")
        drawn = self.sample(n)
        return drawn if self._strategy.has_kernel else drawn.clone()  # a user's function may write into it

    def sample(self, n: int = 1) -> Tensor:
        """`draws` of the step itself, which every strategy has."""
        if self._drawn.shape[1] < n:
            first_stream = self._first_stream("draws")
            self._drawn = sampling.draws(self._raw, self.distribution, self._settings, self.counter, n, first_stream)
        return self._drawn[:, :n]

    def noise(self, kind: Literal["gumbel", "normal"], n: int) -> Tensor:
        """[B, n]: independent standard Gumbel or normal numbers, keyed by seed, row and step.

        A second call returns the same numbers. The two kinds, the draws and the noise on the mix are independent.
        """
        draw = {"gumbel": gumbel, "normal": normal}[kind]
        return draw(*self.counter, n, self._first_stream(kind)).to(self._dtype)

    def _first_stream(self, kind: str) -> int:
        """Of the counter's streams. A strategy of ours reads one kind of numbers alone, from stream 1 on."""
        return 1 if self._strategy.has_kernel else _FIRST_STREAM[kind]

    # Weights

    def softmax(self, ids: Tensor, scores: Tensor | None = None, *, count_repeats: bool = False) -> Tensor:
        """[B, n]: weights of the candidates ids [B, n], a softmax over them alone.

        Args:
            ids: int64 [B, n].
            scores: [B, n], divided by the mixing temperature; None: the candidates' logits, as `candidate_weights`.
            count_repeats: whether an id that stands twice weighs twice. Otherwise only its first place has a weight.
        """
        mixing_temperature = self._settings.mixing_temperature
        temperature = self._sampling_temperature if mixing_temperature is None else mixing_temperature
        if scores is None:
            scores = candidate_scores(self._raw, ids, temperature, self._settings.variant)
        else:
            scores = scores / temperature
        if not count_repeats:
            same = ids[:, :, None] == ids[:, None, :]
            scores = scores.masked_fill(same.tril(-1).any(-1), -torch.inf)
        return scores.softmax(-1)

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype(self._raw)

    @functools.cached_property
    def _sampling_temperature(self) -> Tensor:
        """0-d or [B, 1]."""
        temperature = sampling.sampling_temperature(self._settings.temperature)
        return sampling.column(temperature, self._raw.device).to(self._dtype)
