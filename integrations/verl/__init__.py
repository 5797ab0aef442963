"""N-GRPO in verl: a launcher with verl's arguments and one for each field of `MixingConfig`.

    python -m ngrpo_ops.integrations.verl <the arguments of verl.trainer.main_ppo> +ngrpo.k=3 +ngrpo.mixing_rate=0.1

The loop, losses, advantages, rewards and weight syncs are verl's own, and no method of verl is replaced. Importing this
package puts the adapter's classes into verl's registries. verl imports it in each of its processes, as
``actor_rollout_ref.model.external_lib`` names it. By process:

- Launcher (`launcher`, `dry_run`): writes the ngrpo.* arguments as settings of verl, and refuses settings under which
  nothing would be mixed or replayed (`settings`).
- Task runner (`manager`): gives every training sample a row id. Validation samples get none and are not mixed.
- Agent loops' workers (`agent`): ask for the mixes, and put the record into the sample's `extra_fields`.
- Servers' actors (`server`): fetch the record of a mixed request from the engine before they answer.
- Training workers (`engine`, `samples`): every forward of policy and reference replays the records of its micro-batch.

`checks` has the version and the functions of verl that these rely on.
"""

from __future__ import annotations

from .checks import check_verl

check_verl()

from .registration import register  # noqa: E402  (what it imports needs verl)

register()

__all__ = ["check_verl", "register"]
