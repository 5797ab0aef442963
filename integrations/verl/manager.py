"""verl's agent loop manager, which gives training samples their row ids. Runs in the task runner."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from tensordict.tensorclass import NonTensorStack
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from ngrpo_ops._messages import shown

from .agent import AGENT, FIRST_ROW
from .checks import check_parameters
from .settings import AGENTS, check_settings

check_parameters("manager")

_STEP = 2**32  # row ids of a training step


class MixingAgentLoopManager(AgentLoopManagerTQ):
    """A sample's row id is its step's number and its place in the step. So it is the same after a resume.

    Raises:
        ValueError: see `settings.check_settings`.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_settings(config)
        super().__init__(config, *args, **kwargs)
        self._step: int | None = None
        self._given = 0  # row ids of this step

    def generate_sequences(self, prompts: Any) -> None:
        """verl's. Training prompts get the column of row ids, and the agent loop that mixes; validation prompts do not.

        Raises:
            ValueError: prompts with an agent loop of their own.
        """
        columns = prompts.keys()
        if "validate" not in columns or not prompts["validate"]:
            if "agent_name" in columns:
                others = {*prompts["agent_name"]} - {*AGENTS}
                if others:
                    raise ValueError(
                        f"the data's agent_name must be {' or '.join(AGENTS)}, or left out, got "
                        f"{shown(sorted(others))}: other agent loops are not mixed"
                    )
            step = int(prompts["global_steps"])
            if step != self._step:
                self._step, self._given = step, 0
            counts = [self.rollout_config.n] * len(prompts)
            if "__rollout_n__" in columns:  # a prompt's own number of samples
                counts = [int(count) for count in prompts["__rollout_n__"]]
            *firsts, self._given = accumulate(counts, initial=self._given)
            prompts[FIRST_ROW] = NonTensorStack(*[step * _STEP + first for first in firsts])
            prompts["agent_name"] = NonTensorStack(*[AGENT] * len(prompts))
        super().generate_sequences(prompts)
