"""What the rollouts of all adapters share: table, gates, the decision of a step, and the lookup that mixes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .config import MixingConfig, require_candidates
from .ops.decode_step.api import decode_step, mixing_candidates
from .ops.gaussian_noise import gaussian_noise
from .ops.mix_embeddings import mix_embeddings
from .ops.nearest_neighbors.search import Progress
from .ops.nearest_neighbors.table import NeighborTable, RefreshReport
from .random import gates
from .record import SparseRecord
from .strategies import get_strategy
from .tokens import SpecialRows, special_rows

logger = logging.getLogger(__name__)

# The neighbor table -----------------------------------------------------------------------------------------------


class RolloutTable(NeighborTable):
    """The table that rollouts read, without the rows that `excluded_token_ids` leaves out.

    Args:
        config: how the rollouts mix.
        vocabulary: V, the rows of the input table.
        special: the rows that the tokenizer says "special" leaves out; None: `excluded_token_ids` says something else.
        log: called once, after the first refresh, with how many rows "special" leaves out.
    """

    _excludes_equal_rows = "excluded_token_ids='special'"

    def __init__(
        self, config: MixingConfig, vocabulary: int, special: SpecialRows | None, log: Callable[[str], None]
    ) -> None:
        allowed = _allowed(config, vocabulary, special)
        super().__init__(config.k - 1, metric=config.metric, allowed=allowed, exclude_equal_rows=special is not None)
        self._unsaid, self._log = special, log

    def refresh(
        self, embedding: Tensor, *, group: ProcessGroup | None = None, progress: Progress | None = None
    ) -> RefreshReport:
        report = super().refresh(embedding, group=group, progress=progress)
        if self._unsaid is not None:
            assert self.equal_rows is not None
            self._log(_left_out(self._unsaid, self.equal_rows.cpu()))
            self._unsaid = None
        return report


def reads_table(config: MixingConfig) -> bool:
    """Whether rollouts of this configuration read a neighbor table."""
    return get_strategy(config.strategy).reads_neighbors and config.k > 1 and config.mixing_rate > 0


def make_table(
    config: MixingConfig, vocabulary: int, tokenizer: Any = None, log: Callable[[str], None] = logger.info
) -> RolloutTable | None:
    """The table that rollouts of this configuration read, to be refreshed; None if they read none.

    Args:
        tokenizer: the model's, which `excluded_token_ids` "special" asks.
        log: called once, after the first refresh, with how many rows "special" leaves out.

    Raises:
        ValueError: "special" without a tokenizer, or fewer tokens left than a mix has candidates.
    """
    if not reads_table(config):
        return None
    special = None
    if config.excluded_token_ids == "special":
        if tokenizer is None:
            raise ValueError(
                "excluded_token_ids='special' asks the tokenizer, and there is none: give one, or set "
                "excluded_token_ids=None, which leaves no token out"
            )
        special = special_rows(tokenizer, vocabulary)
    return RolloutTable(config, vocabulary, special, log)


def _allowed(config: MixingConfig, vocabulary: int, special: SpecialRows | None) -> Tensor | None:
    """bool [V], the rows that may be neighbors by the settings and the tokenizer; None: all."""
    if config.allowed_token_ids is None and not config.excluded_token_ids:
        return None
    allowed = torch.ones(vocabulary, dtype=torch.bool, device="cpu")
    if config.allowed_token_ids is not None:
        allowed.zero_()[list(config.allowed_token_ids)] = True
    if special is not None:
        allowed &= ~(special.beyond | special.special)
    elif config.excluded_token_ids:
        allowed[list(config.excluded_token_ids)] = False
    require_candidates(config, int(allowed.sum()))
    return allowed


def _left_out(special: SpecialRows, equal: Tensor) -> str:
    """How many rows "special" leaves out. A row counts once, for the first of the reasons that it has."""
    beyond, by_name = special.beyond, special.special & ~special.beyond
    by_value = equal & ~(beyond | by_name)
    count = int((beyond | by_name | by_value).sum())
    return (
        f"{count:,} of {len(beyond):,} token embeddings are no neighbors (excluded_token_ids='special'): "
        f"{int(beyond.sum()):,} beyond the tokenizer, {int(by_name.sum()):,} of special or reserved tokens, "
        f"{int(by_value.sum()):,} equal to another"
    )


def neighbor_ids(
    config: MixingConfig, table: NeighborTable | None, vocabulary: int, device: torch.device
) -> Tensor | None:
    """[V, k - 1], as `decode_step` takes them; None for a strategy that reads no neighbors."""
    if not get_strategy(config.strategy).reads_neighbors:
        return None
    if table is None:  # none at k = 1; at a rate of 0 nobody looks
        return torch.zeros((), dtype=torch.int64, device=device).expand(vocabulary, config.k - 1)
    return table.ids


# The decision of a step -------------------------------------------------------------------------------------------


def gate_schedule(config: MixingConfig, row_ids: Tensor, first_steps: Tensor, count: int) -> Tensor:
    """bool [R, count]: which of the next `count` steps of each row the rate draws.

    The schedule depends on seed, row id and step alone. It is computed on the CPU ahead of time, so that no step waits
    for the device.

    Args:
        row_ids: int64 [R], on the CPU.
        first_steps: int64 [R] or 0-d, the first of the steps.
        count: how many steps.
    """
    steps = first_steps.reshape(-1, 1) + torch.arange(count, device="cpu")
    return gates(torch.tensor(config.seed, device="cpu"), row_ids[:, None], steps, config.mixing_rate)


class Decision(NamedTuple):
    """A step's mixed rows: gate [R] says which are mixed in the end. Those emit token_ids [R].

    Rows that are not mixed emit token_ids too where the sampler is "counter_based". With the native sampler they emit
    what that has drawn. ids and weights [R, k]; fault int32 [R].
    """

    gate: Tensor
    token_ids: Tensor
    ids: Tensor
    weights: Tensor
    fault: Tensor


def decide(
    config: MixingConfig,
    logits: Tensor,
    neighbors: Tensor | None,
    *,
    temperature: float | Tensor,
    step: int | Tensor,
    row_ids: Tensor,
    stopped: Tensor,
    filters: Mapping[str, Any],
) -> Decision:
    """The decision of a step, for rows that the rate has drawn or, with the sampler "counter_based", for all rows.

    Args:
        logits: [R, V], after penalties, before temperature and filters.
        neighbors: see `neighbor_ids`.
        temperature: of the sampler, for all rows or [R]; 0 is greedy.
        step, row_ids: what the rows are drawn by.
        stopped: bool [R]; such a row is not mixed any more.
        filters: top_k, top_p and min_p, those that are set.
    """
    common: dict[str, Any] = {
        "strategy": config.strategy, "k": config.k, "temperature": temperature,
        "mixing_temperature": config.temperature, "variant": config.variant, "seed": config.seed, "step": step,
        "row_ids": row_ids, **config.options, **(filters if config.draws else {}),
    }  # fmt: skip
    threshold = config.entropy_threshold
    if config.sampler == "counter_based":
        out = decode_step(
            logits, None, neighbors, **common, mixing_rate=config.mixing_rate, enabled=~stopped,
            entropy_threshold=threshold,
        )  # fmt: skip
        return Decision(out.gate, out.token_ids, out.ids, out.weights, out.fault)
    found = mixing_candidates(logits, neighbors, **common, return_entropy=threshold is not None)
    gate = (found.fault == 0) & ~stopped
    if threshold is not None and found.entropy is not None:
        gate = gate & (found.entropy >= threshold)
    return Decision(gate, found.ids[:, 0], found.ids, found.weights, found.fault)


# The lookup that mixes --------------------------------------------------------------------------------------------


@dataclass
class Noise:
    """The noise on M mixes: arguments of `gaussian_noise`, each [M]."""

    scale: Tensor
    seed: Tensor
    row_ids: Tensor
    steps: Tensor

    @staticmethod
    def of(config: MixingConfig, row_ids: Tensor, steps: Tensor) -> Noise | None:
        """The noise on the mixes of these rows at these steps; None: the strategy adds none."""
        strategy = get_strategy(config.strategy)
        if not strategy.adds_noise:
            return None
        scale = strategy.named_options(strategy.option_values(config.options))["noise_scale"]
        return Noise(
            torch.full_like(row_ids, scale, dtype=torch.float32), torch.full_like(row_ids, config.seed), row_ids, steps
        )

    def __getitem__(self, which: Tensor) -> Noise:
        return Noise(self.scale[which], self.seed[which], self.row_ids[which], self.steps[which])

    def to(self, device: torch.device) -> Noise:
        return Noise(self.scale.to(device), self.seed.to(device), self.row_ids.to(device), self.steps.to(device))

    def add_to(self, mixed: Tensor) -> Tensor:
        return gaussian_noise(mixed, self.scale, seed=self.seed, row_ids=self.row_ids, steps=self.steps)


@dataclass
class Overlay:
    """What a forward embeds in the place of its own tokens.

    At flat `positions` [M] it embeds the mix of `ids` [M, k] by `weights` [M, k], with its noise, where `gate` [M] says
    so (None: everywhere).
    """

    positions: Tensor
    ids: Tensor
    weights: Tensor
    gate: Tensor | None = None
    noise: Noise | None = None

    def __getitem__(self, which: Tensor) -> Overlay:
        gate, noise = (None if x is None else x[which] for x in (self.gate, self.noise))
        return Overlay(self.positions[which], self.ids[which], self.weights[which], gate, noise)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Overlay:
        gate, noise = (None if x is None else x.to(device) for x in (self.gate, self.noise))
        positions, ids, weights = (x.to(device) for x in (self.positions, self.ids, self.weights))
        return Overlay(positions, ids, weights, gate, noise)  # type: ignore[arg-type]

    def extend(self, input_ids: Tensor) -> Tensor:
        """The flattened ids of a forward and the candidates' [n + M k]: one native lookup embeds both."""
        return torch.cat([input_ids.reshape(-1), self.ids.reshape(-1).to(input_ids.dtype)])

    def mix(self, embedded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the lookup of `extend`'s ids returned, taken apart.

        Args:
            embedded: [n + M k, d].

        Returns:
            The forward's own embeddings [n, d], what belongs at `positions` [M, d], and the anchors' embeddings [M, d].
        """
        count = len(embedded) - self.ids.numel()
        own, candidates = embedded[:count], embedded[count:]
        places = torch.arange(len(candidates), device=candidates.device).view(self.ids.shape)
        mixed = mix_embeddings(candidates, places, self.weights)
        if self.noise is not None:
            mixed = self.noise.add_to(mixed)
        if self.gate is not None:
            mixed = torch.where(self.gate[:, None], mixed, own[self.positions])
        return own, mixed, candidates.view(*self.ids.shape, -1)[:, 0]

    def in_slice(self, index: int, length: int) -> Overlay:
        """The part of a forward's overlay in slice `index` of its flattened ids, which are cut into slices of `length`.

        Sequence-parallel ranks have a slice each.

        Examples:
            >>> import torch
            >>> from ngrpo_ops.rollout import Overlay
            >>> whole = Overlay(torch.tensor([1, 6]), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3) / 3)
            >>> whole.in_slice(1, length=5).positions
            tensor([1])
        """
        part = self[self.positions // length == index]
        return replace(part, positions=part.positions - index * length)


def replay_overlay(records: Sequence[SparseRecord], starts: Tensor) -> Overlay | None:
    """What a forward of several samples embeds at its mixed positions; None: nothing is mixed.

    Args:
        records: one for each sample.
        starts: int64 [B], the position of each sample's first token among the flattened ids of the forward.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.record import SparseRecord
        >>> from ngrpo_ops.rollout import replay_overlay
        >>> ids, weights, logprobs = torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.5]]), torch.zeros(2)
        >>> records = [SparseRecord(1, torch.tensor([step]), ids, weights, logprobs) for step in (0, 1)]
        >>> replay_overlay(records, torch.tensor([0, 3])).positions.tolist()
        [1, 5]
    """
    starts = starts.cpu()
    counts = torch.tensor([len(record.steps) for record in records], dtype=torch.int64, device="cpu")
    if not int(counts.sum()):
        return None
    rows = torch.arange(len(records), device="cpu").repeat_interleave(counts)
    first = torch.tensor([record.first for record in records], device="cpu")
    steps, ids, weights = (torch.cat([getattr(r, name) for r in records]) for name in ("steps", "ids", "weights"))
    noise = None
    if records[0].noise is not None:
        by_record = zip(*(record.noise or () for record in records), strict=True)
        scale, seed, row_ids = (torch.tensor(values, device="cpu")[rows] for values in by_record)
        noise = Noise(scale, seed, row_ids, steps)
    return Overlay(starts[rows] + first[rows] + steps, ids, weights, noise=noise)
