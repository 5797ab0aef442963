"""N-GRPO in OpenRLHF: a launcher that replaces OpenRLHF's, with its arguments and one for each field of `MixingConfig`.

    python -m ngrpo_ops.integrations.openrlhf <OpenRLHF's arguments> --ngrpo.k 3 --ngrpo.mixing_rate 0.1

The loop, losses, advantages, rewards and weight syncs are OpenRLHF's own. The adapter adds, process by process:

- Launcher (`launcher`, `checks`, `settings`, `dry_run`): refuses settings under which nothing would be mixed or
  replayed, names the executor as the agent file, and gives Ray's workers `install` as their setup hook.
- Samples generator (`workers`): gives every training sample a row id. Evaluation samples get none and are not mixed.
- Engine's actor (`executor`): starts an engine that mixes. A sample returns with its record in `mm_train_inputs`, where
  OpenRLHF carries the processor outputs of vision-language models.
- Policy and reference actors (`workers`, `samples`): `forward` and `training_step` replay the records on the input
  embeddings.

Importing this package loads nothing of OpenRLHF, Ray, vLLM or transformers: every worker of Ray imports it.
"""

from .checks import check_openrlhf
from .launcher import main
from .workers import install, uninstall

__all__ = ["check_openrlhf", "install", "main", "uninstall"]
