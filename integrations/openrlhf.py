"""N-GRPO in OpenRLHF: a launcher in the place of its own, with the same arguments and those of `MixingConfig`.

    python -m ngrpo_ops.integrations.openrlhf <OpenRLHF's arguments> --ngrpo.k 3 --ngrpo.mixing_rate 0.1

The loop, losses, advantages, rewards and weight syncs are OpenRLHF's. What is added, and in which process:

- launcher: refuses what would not mix or not be replayed, names our executor as the agent file, and gives Ray's workers
  `install` as their setup hook.
- samples' generator: a row id for every training sample; evaluation gets none and is not mixed.
- engine (`openrlhf_executor`): started as one that mixes; a sample comes back with its record, in the place of the
  processor's output of a vision-language model, which OpenRLHF carries along with every sample.
- actors, policy and reference: `forward` and `training_step` replay the records on their input embeddings.

`install` changes a module just after its import, so that a worker loads no part of OpenRLHF that it would not have.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import re
import runpy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.versions import TESTED, is_tested

_SETTINGS = "NGRPO_OPS_OPENRLHF"  # the environment variable by which workers know what the launcher read
_LONGEST_SETTING = 100_000  # characters; Linux takes 128 KiB with its name
_CLI = "openrlhf.cli.train_ppo_ray"

# Of everything that is changed or relied on: OpenRLHF promises none of it, and a change must stop the start.
_EXPECTED_PARAMETERS = {
    "openrlhf.models.actor:Actor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs",
        "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
    ],
    "openrlhf.models.ring_attn_utils:unpad_and_slice_tensor": ["sequences", "attention_mask", "ring_attn_group"],
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.make_experience": ["self", "samples_list"],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.__init__": [
        "self", "strategy", "prompts_dataloader", "eval_dataloader", "tokenizer", "vllm_engines",
    ],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.generate_eval_samples": ["self", "generate_kwargs"],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._dispatch_prompts_to_vllm": [
        "self", "prompts", "labels", "images", "generate_kwargs",
    ],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience": [
        "self", "response", "generate_kwargs",
    ],
    "openrlhf.trainer.ray.launcher:BaseModelActor.execute_batch": [
        "self", "method_name", "all_data", "start_idx", "end_idx",
    ],
    "openrlhf.trainer.ray.launcher:ReferenceModelActor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "return_output", "packed_seq_lens",
        "mm_train_inputs_list",
    ],
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "packed_seq_lens", "mm_train_inputs_list",
    ],
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.ppo_train": ["self", "kl_ctl"],
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step": [
        "self", "experience", "kl_ctl", "step", "loss_batch_info",
    ],
    "openrlhf.trainer.ray.vllm_engine:_load_agent_executor": ["agent_func_path"],
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate": [
        "self", "prompt_token_ids", "sampling_params", "multi_modal_data",
    ],
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate_responses": [
        "self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "num_samples", "images",
    ],
    "openrlhf.utils:get_strategy": ["args"],
    "openrlhf.utils.agent:SingleTurnAgentExecutor.__init__": ["self", "remote_rm_url"],
    "openrlhf.utils.agent:SingleTurnAgentExecutor.execute": [
        "self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "llm_engine", "images",
    ],
}  # fmt: skip


def check_openrlhf() -> None:
    """
    Raises:
        ImportError: OpenRLHF is not installed, another than the tested, or changed where this adapter relies on it.
    """
    try:
        version = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"this adapter needs OpenRLHF and its vLLM: pip install 'openrlhf[vllm]=={TESTED['openrlhf']}'"
        ) from error
    if not is_tested("openrlhf", version):
        raise ImportError(
            f"OpenRLHF {version} is not tested with this version of ngrpo-ops, which replays in OpenRLHF "
            f"{TESTED['openrlhf']}: what it extends is private to OpenRLHF"
        )
    from . import vllm

    if not vllm._is_tested():  # the engines refuse it too, but OpenRLHF's actors would wait for them
        raise ImportError(f"vLLM {vllm.vllm.__version__} is not tested with this version of ngrpo-ops")
    for target in _EXPECTED_PARAMETERS:
        _check(target)


def _check(target: str) -> None:
    expected = _EXPECTED_PARAMETERS[target]
    owner, name = _resolve(target)
    method = getattr(owner, name, None)
    found = None
    if callable(method) and not getattr(method, "__isabstractmethod__", False):
        found = [name for name in inspect.signature(method).parameters if name != "_ray_trace_ctx"]  # added by Ray
    if found != expected:
        raise ImportError(
            f"OpenRLHF has changed {target}: expected parameters {expected}, found {found}. This version of ngrpo-ops "
            f"is tested with OpenRLHF {TESTED['openrlhf']}."
        )


def _resolve(target: str) -> tuple[Any, str]:
    """The module or class of a target, None if there is none, and the name there."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent, None)
        metadata = getattr(owner, "__ray_metadata__", None)  # of a class that Ray has made an actor
        owner = owner if metadata is None else metadata.modified_class
    return owner, name


# A sample and its record -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixedSample:
    """One rollout's record, by the positions of its own tokens, prompt first and without padding.

    Args:
        first: position of the first generated token.
        steps: int64 [M], the mixed steps, ascending; step t's token is at position first + t.
        ids: int64 [M, k]; weights: float32 [M, k]; see `MixRecord`.
        logprobs: float32 [T], of every generated token.
        noise: scale, seed and row id, of strategy "gaussian".
    """

    first: int
    steps: Tensor
    ids: Tensor
    weights: Tensor
    logprobs: Tensor
    noise: tuple[float, int, int] | None = None

    @classmethod
    def of(cls, record: MixRecord, first: int) -> MixedSample:
        """The only row of a record."""
        (steps,) = record.gate[0].nonzero(as_tuple=True)
        assert record.logprobs is not None
        noise = None
        if record.row_ids is not None:
            assert record.noise_scale is not None and record.noise_seed is not None
            noise = float(record.noise_scale[0]), int(record.noise_seed[0]), int(record.row_ids[0])
        return cls(first, steps, record.ids[0, steps], record.weights[0, steps], record.logprobs[0], noise)

    def cut(self, length: int) -> MixedSample:
        """What is left of it where the tokens are cut to `length`."""
        left = max(length - self.first, 0)
        keep = self.steps < left
        return replace(
            self, steps=self.steps[keep], ids=self.ids[keep], weights=self.weights[keep], logprobs=self.logprobs[:left]
        )


def action_ranges(sample: MixedSample) -> list[tuple[int, int]]:
    """The generated tokens that were not mixed, as OpenRLHF's ranges of tokens that enter the loss."""
    bounds = [-1, *sample.steps.tolist(), len(sample.logprobs)]
    ranges = [(sample.first + a + 1, sample.first + b) for a, b in itertools.pairwise(bounds)]
    return [(start, end) for start, end in ranges if start < end]


def place(samples: Sequence[MixedSample], attention_mask: Tensor, packed: bool, group: Any = None) -> Any:
    """What a forward of the samples embeds: an `Overlay` by the positions of its flattened ids.

    Args:
        samples: B.
        attention_mask: [B, L], of rows padded on the right.
        packed: whether the forward is of all rows in one, without the padding.
        group: the processes that share a packed forward (ring attention), each with a slice of it; None: there is one.
    """
    from ngrpo_ops.rollout import Noise, Overlay

    device = attention_mask.device
    counts = torch.tensor([len(sample.steps) for sample in samples])
    steps = torch.cat([sample.steps for sample in samples])
    first = torch.tensor([sample.first for sample in samples])
    rows = torch.arange(len(samples)).repeat_interleave(counts)
    positions = (rows * attention_mask.shape[1] + first[rows] + steps).to(device)
    ids = torch.cat([sample.ids for sample in samples]).to(device)
    weights = torch.cat([sample.weights for sample in samples]).to(device)
    noise = None
    if samples[0].noise is not None:
        scale, seed, row_ids = zip(*(sample.noise or () for sample in samples), strict=True)
        of_rows = [torch.tensor(values)[rows].to(device) for values in (scale, seed, row_ids)]
        noise = Noise(of_rows[0], of_rows[1], of_rows[2], steps.to(device))
    if packed:
        positions = (attention_mask.flatten().cumsum(0) - 1)[positions]
    if packed and group is not None:
        # OpenRLHF pads the packed row to a multiple of the group and gives each rank a slice.
        size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        length = -(-int(attention_mask.sum()) // size)
        ours = positions // length == rank
        positions, ids, weights = positions[ours] - rank * length, ids[ours], weights[ours]
        if noise is not None:
            noise = Noise(noise.scale[ours], noise.seed[ours], noise.row_ids[ours], noise.steps[ours])
    return Overlay(positions, ids, weights, noise=noise)


def rollout_metrics(experiences: Sequence[Any]) -> dict[str, float]:
    """What the records of a whole rollout tell, once the policy has scored it; as in `NGRPOTrainer`."""
    gated = tokens = 0
    differs = weight = 0.0
    errors = []
    for experience in experiences:
        for row, sample in enumerate(experience.mm_train_inputs):
            gated += len(sample.steps)
            tokens += len(sample.logprobs)
            differs += float((1 - sample.logprobs[sample.steps].exp()).double().sum())
            weight += float(sample.weights[:, 0].double().sum())
            # Column j scores the token at position j + 1.
            columns = slice(sample.first - 1, sample.first - 1 + len(sample.logprobs))
            scored = experience.action_log_probs[row, columns].float() - sample.logprobs
            errors.append((scored * experience.action_mask[row, columns]).abs())
    return {
        "mix/gated_share": gated / tokens,
        "mix/anchor_differs": differs / gated if gated else float("nan"),
        "mix/anchor_weight": weight / gated if gated else float("nan"),
        "mix/replay_error": float(torch.cat(errors).max()),
    }


# The workers -------------------------------------------------------------------------------------------------------


def _numbered(original: Callable) -> Callable:
    """SamplesGenerator.__init__: the count of samples goes with the state of the prompts' loader, which a checkpoint
    keeps."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.next_row, self.evaluating = 0, False
        loader = self.prompts_dataloader
        state_dict, load_state_dict = loader.state_dict, loader.load_state_dict

        def load(state: dict[str, Any]) -> None:
            state = dict(state)
            self.next_row = state.pop("ngrpo_next_row", 0)  # a checkpoint of plain GRPO has none
            load_state_dict(state)

        loader.state_dict = lambda: state_dict() | {"ngrpo_next_row": self.next_row}
        loader.load_state_dict = load

    return __init__


def _unmixed(original: Callable) -> Callable:
    """SamplesGenerator.generate_eval_samples"""

    def generate_eval_samples(self: Any, **kwargs: Any) -> Any:
        self.evaluating = True
        try:
            return original(self, **kwargs)
        finally:
            self.evaluating = False

    return generate_eval_samples


def _dispatched(original: Callable) -> Callable:
    """SamplesGenerator._dispatch_prompts_to_vllm: row ids, by the place of a sample among all that were generated."""

    def _dispatch_prompts_to_vllm(self: Any, prompts: list, labels: list, *, images: Any = None, **kwargs: Any) -> Any:
        rows = None
        if not self.evaluating:
            count = kwargs.get("n_samples_per_prompt", self.args.rollout.n_samples_per_prompt)
            firsts = range(self.next_row, self.next_row + count * len(prompts), count)
            # The only argument that is of a prompt's own. Its samples are begun in order, in one process, and each
            # takes the next.
            rows = [iter(range(first, first + count)) for first in firsts]
            self.next_row += count * len(prompts)
        return original(self, prompts, labels, images=rows, **kwargs)

    return _dispatch_prompts_to_vllm


def _whole(original: Callable) -> Callable:
    """SamplesGenerator._process_response_into_experience: it measures from the first token in the loss to the last."""

    def _process_response_into_experience(self: Any, response: dict, **kwargs: Any) -> Any:
        experience = original(self, response, **kwargs)
        sample = response.get("mm_train_inputs")
        if isinstance(sample, MixedSample):
            length = len(sample.cut(len(experience.sequences[0])).logprobs)
            experience.response_length = torch.full_like(experience.response_length, length)
        return experience

    return _process_response_into_experience


def _measured(original: Callable) -> Callable:
    """RemoteExperienceMaker.make_experience: what it puts into `info` is logged as the mean over samples."""

    def make_experience(self: Any, samples_list: list) -> list:
        for samples in samples_list:
            if not all(isinstance(sample, MixedSample) for sample in samples.mm_train_inputs):
                raise RuntimeError(
                    "a training sample has no record: it was not generated by ngrpo-ops' executor, or OpenRLHF has "
                    "dropped `mm_train_inputs`"
                )
        experiences = original(self, samples_list)
        metrics = rollout_metrics(experiences)
        for experience in experiences:
            for name, value in metrics.items():
                experience.info[name] = torch.full((len(experience.sequences),), value)
        return experiences

    return make_experience


def _scored(original: Callable) -> Callable:
    """BaseModelActor.execute_batch: the forwards that score a rollout, of policy and reference."""

    def execute_batch(self: Any, method_name: str, all_data: dict, start_idx: int, end_idx: int) -> list:
        run = functools.partial(original, self, method_name, all_data, start_idx, end_idx)
        if method_name != "forward" or "mm_train_inputs_list" not in all_data:
            return run()
        model = self.actor if hasattr(self, "actor") else self.model
        with replaying(model, all_data["mm_train_inputs_list"][start_idx:end_idx]):
            return run()

    return execute_batch


_STEPS = "mix/steps"  # mixed steps of a sample


def _trained(original: Callable) -> Callable:
    """ActorPPOTrainer.training_step"""

    def training_step(self: Any, experience: Any, *args: Any, **kwargs: Any) -> dict:
        with replaying(self.actor, [experience.mm_train_inputs]):
            status = original(self, experience, *args, **kwargs)
        cosines, rows = _mixer(self.actor).cosines, len(experience.sequences)  # on the actor's device
        total, steps = sum(float(x.sum()) for x in cosines), sum(map(len, cosines))
        status["metrics"] |= {"mix/cosine": total / rows, _STEPS: steps / rows}
        status["weights"] |= {"mix/cosine": "sample", _STEPS: "sample"}
        return status

    return training_step


def _averaged(original: Callable) -> Callable:
    """ActorPPOTrainer.ppo_train: its averages are over samples; the cosine's is over mixed steps."""

    def ppo_train(self: Any, kl_ctl: float) -> dict:
        status = original(self, kl_ctl)
        steps = status.pop(_STEPS, 0)
        if "mix/cosine" in status:
            status["mix/cosine"] = status["mix/cosine"] / steps if steps else float("nan")
        return status

    return ppo_train


def _replayed(original: Callable) -> Callable:
    """Actor.forward, within `replaying`."""
    signature = inspect.signature(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches = vars(self).get("mixed_batches")
        if batches is None:
            return original(self, *args, **kwargs)
        if not batches:
            raise RuntimeError("the model runs more often than there are batches of records to replay")
        given = signature.bind(self, *args, **kwargs).arguments
        overlay = place(batches.popleft(), given["attention_mask"], self.packing_samples, given.get("ring_attn_group"))
        with _mixer(self).replaying_at(overlay):
            return original(self, *args, **kwargs)

    return forward


@contextmanager
def replaying(actor: Any, batches: Sequence[Sequence[MixedSample]]) -> Iterator[None]:
    """Within it the forwards of an OpenRLHF `Actor` replay the batches, one each, in order.

    Raises:
        RuntimeError: another number of forwards, or one of other sequences.
    """
    actor.mixed_batches = left = deque(batches)
    try:
        yield
    finally:
        del actor.mixed_batches
    if left:
        raise RuntimeError(f"{len(left)} of {len(batches)} batches of records were not replayed")


def _mixer(actor: Any) -> Any:
    from .transformers import EmbeddingMixer

    if "mixer" not in vars(actor):
        model = getattr(actor.model, "module", actor.model)  # in DeepSpeed's engine
        actor.mixer = EmbeddingMixer(model.get_input_embeddings())
    return actor.mixer


_PATCHES: dict[str, Callable[[Callable], Callable]] = {
    "openrlhf.models.actor:Actor.forward": _replayed,
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.make_experience": _measured,
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.__init__": _numbered,
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.generate_eval_samples": _unmixed,
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._dispatch_prompts_to_vllm": _dispatched,
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience": _whole,
    "openrlhf.trainer.ray.launcher:BaseModelActor.execute_batch": _scored,
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.ppo_train": _averaged,
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step": _trained,
}
_originals: dict[str, Any] = {}  # of every target that something stands in for


def install() -> None:
    """Let this process replay: the setup hook of Ray's workers. A second call changes nothing.

    Raises:
        ImportError: OpenRLHF has changed a method; from here, or from the import of its module.
    """
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for module in {target.partition(":")[0] for target in _PATCHES} & set(sys.modules):
        _patch(module)


def uninstall() -> None:
    """Undo `install`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
    for target, original in _originals.items():
        owner, name = _resolve(target)
        setattr(owner, name, original)
    _originals.clear()


def _patch(module: str) -> None:
    for target, make in _PATCHES.items():
        if target.partition(":")[0] != module or target in _originals:
            continue
        _check(target)
        substitute(target, make)


def substitute(target: str, make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of a target in its place, until `uninstall`."""
    owner, name = _resolve(target)
    original = getattr(owner, name)
    _originals.setdefault(target, original)
    made = make(original)
    setattr(owner, name, made if isinstance(original, type) else functools.wraps(original)(made))


class _AfterImport:
    """A finder of the modules to be patched, which patches them once they have been executed."""

    def __init__(self) -> None:
        self.targets = {target.partition(":")[0] for target in _PATCHES}
        self.finding: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        # Every time that it is asked: a look for the module alone, or an import that failed, patches nothing.
        if name not in self.targets or name in self.finding:
            return None
        self.finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.finding.remove(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                for target in [target for target in _originals if target.partition(":")[0] == name]:
                    del _originals[target]  # of an earlier import
                _patch(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def read_settings() -> tuple[MixingConfig, str]:
    """The configuration, and the reward's URLs or file, as the launcher has read them."""
    settings = json.loads(os.environ[_SETTINGS])
    return MixingConfig(**settings["mixing"]), settings["reward_url"]


# The launcher ------------------------------------------------------------------------------------------------------


def main() -> None:
    """OpenRLHF's command line, which is read, checked and run as it is."""
    check_openrlhf()
    import openrlhf.utils
    import ray

    parse, init, get_strategy = argparse.ArgumentParser.parse_args, ray.init, openrlhf.utils.get_strategy
    read: dict[str, Any] = {}

    def parse_args(parser: argparse.ArgumentParser, *given: Any, **keywords: Any) -> Any:
        if "--train.agent_func_path" not in parser._option_string_actions or read:
            return parse(parser, *given, **keywords)
        add_arguments(parser)
        args = parse(parser, *given, **keywords)
        config = read_arguments(parser, args)
        read["dry_run"] = vars(args).pop("ngrpo.dry_run")
        if read["dry_run"]:
            config = strongly_mixed(config)
        settings = json.dumps({"mixing": asdict(config), "reward_url": vars(args)["reward.remote_url"]})
        if len(settings) > _LONGEST_SETTING:
            parser.error(
                f"--ngrpo.allowed_token_ids: {len(config.allowed_token_ids or ())} token ids are too many, as they "
                f"reach the workers in an environment variable of at most {_LONGEST_SETTING} characters"
            )
        os.environ[_SETTINGS] = settings
        vars(args)["train.agent_func_path"] = str(Path(__file__).with_name("openrlhf_executor.py"))
        return args

    def init_with_hook(*given: Any, runtime_env: Any = None, **keywords: Any) -> Any:
        if read["dry_run"]:
            return None
        runtime_env = dict(runtime_env or {})
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), _SETTINGS: os.environ[_SETTINGS]}
        runtime_env["worker_process_setup_hook"] = f"{install.__module__}.{install.__name__}"
        return init(*given, runtime_env=runtime_env, **keywords)

    def get_strategy_or_try(args: Any) -> Any:
        strategy = get_strategy(args)
        if read["dry_run"]:
            raise SystemExit(dry_run(strategy))
        return strategy

    with (
        _replaced(argparse.ArgumentParser, "parse_args", parse_args),
        _replaced(ray, "init", init_with_hook),
        _replaced(openrlhf.utils, "get_strategy", get_strategy_or_try),
    ):
        if ray.is_initialized():
            raise RuntimeError("Ray runs in this process already: the launcher must be the one to connect to it")
        runpy.run_module(_CLI, run_name="__main__")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One ``--ngrpo.X`` for each field X of `MixingConfig`, and ``--ngrpo.dry_run``."""
    group = parser.add_argument_group("N-GRPO")
    hints, texts = get_type_hints(MixingConfig), _field_texts()
    for field in fields(MixingConfig):
        default = None if field.name == "seed" else field.default
        help = texts.get(field.name, "") + (" Default: --train.seed." if field.name == "seed" else "")
        group.add_argument(f"--ngrpo.{field.name}", default=default, help=help, **_argument(hints[field.name]))
    group.add_argument(
        "--ngrpo.dry_run",
        action="store_true",
        help="Roll two prompts out and replay them, in this process and without Ray; print how well the two agree, and "
        "exit: 0 if they do.",
    )


def _argument(hint: Any) -> dict[str, Any]:
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return {"choices": options}
    if hint is bool:
        return {"type": _boolean, "metavar": "{true,false}"}
    if any(get_origin(option) is Sequence for option in (hint, *options)):
        return {"type": int, "nargs": "*"}
    return {"type": float if float in (hint, *options) else int}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _field_texts() -> dict[str, str]:
    """The entries of the Args section of `MixingConfig`'s docstring."""
    _, _, text = inspect.cleandoc(MixingConfig.__doc__ or "").partition("Args:\n")
    text, _, _ = text.partition("\n\n")
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(entry.split()).replace("%", "%%").replace("``", "") for name, entry in entries}


def read_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> MixingConfig:
    """The configuration in parsed arguments. A refused setting is an error of the command line, with the reason."""
    values = vars(args)
    mixing = {field.name: values[f"ngrpo.{field.name}"] for field in fields(MixingConfig)}
    if mixing["seed"] is None:
        mixing["seed"] = values["train.seed"]
    try:
        config = MixingConfig(**mixing)
    except ValueError as error:  # its message begins with the name of the field
        parser.error(f"--ngrpo.{error}")
    for name, (is_set, reason) in _refused(values).items():
        if is_set:
            parser.error(f"{name} is not supported with N-GRPO: {reason}")
    size = _vocabulary_size(values["actor.model_name_or_path"])
    try:
        if size is not None:
            config.require_vocabulary(size)
    except ValueError as error:
        parser.error(f"--ngrpo.{error}")
    return config


def _vocabulary_size(model: str) -> int | None:
    """None: there is no such model, which OpenRLHF will say."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=True).get_text_config().vocab_size
    except OSError:
        return None


def _refused(values: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    from openrlhf.utils.utils import is_vlm_model

    return {
        "--algo.advantage.estimator gae": (
            values["algo.advantage.estimator"] == "gae",
            "its critic would value plain tokens where the policy has seen mixes; use group_norm (GRPO), dr_grpo, rloo "
            "or reinforce_baseline",
        ),
        "--train.agent_func_path": (
            values["train.agent_func_path"],
            "an executor of your own is not mixed, and the turns of several would be encoded again without their mixes",
        ),
        "a reward model without --reward.remote_url": (
            not values["reward.remote_url"],
            "OpenRLHF leaves its reward model out where there is an agent file, as there is with N-GRPO; serve it with "
            "openrlhf.cli.serve_rm, or name a Python file with a reward_func",
        ),
        "--vllm.num_engines 0": (not values["vllm.num_engines"], "the engines are what mixes"),
        "--vllm.enable_prefix_caching": (
            values["vllm.enable_prefix_caching"],
            "cached blocks are found by token ids alone, and would be taken for those of another mix",
        ),
        "--data.max_images_per_prompt": (
            values["data.max_images_per_prompt"],
            "vision-language models are not supported",
        ),
        "--actor.model_name_or_path": (
            is_vlm_model(values["actor.model_name_or_path"]),
            "vision-language models are not supported",
        ),
        "--ds.deepcompile": (values["ds.deepcompile"], "the hooks that replay are not part of a compiled forward"),
    }


# The dry run -------------------------------------------------------------------------------------------------------

_DRY_TOKENS = 128  # at most, of a sample


def strongly_mixed(config: MixingConfig) -> MixingConfig:
    """The configuration with mixes that a policy which does not replay them could not overlook: at the paper's settings
    they may be within bfloat16's rounding of the anchor."""
    rate = max(config.mixing_rate, 0.5)
    temperature = max(config.temperature or 1.0, 4.0)
    return replace(
        config, mixing_rate=rate, temperature=temperature, variant="paper", entropy_threshold=None, stop_token_ids=(),
        loss_on_mixed_steps=True,
    )  # fmt: skip


def dry_run(strategy: Any) -> int:
    """Two prompts, rolled out with and without mixes by an engine, then scored by the policy; in this process.

    The engine, the executor, the records and the policy's forward are those of a training run, the mixes stronger (see
    `strongly_mixed`); DeepSpeed, the optimizer and Ray are left out.

    Returns:
        An exit status: 0 if the policy agrees with the engine on mixed rollouts as well as it does on plain ones, and
        does not where it is not given the mixes.
    """
    import asyncio

    from openrlhf.models import Actor
    from openrlhf.trainer.ppo_trainer import prepare_datasets
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from openrlhf.utils import get_tokenizer

    install()
    args = strategy.args
    name, fast = args.actor.model_name_or_path, not args.data.disable_fast_tokenizer
    tokenizer = get_tokenizer(name, None, "left", strategy, use_fast=fast)
    loader, _, _ = prepare_datasets(strategy, tokenizer)
    prompts = [(texts[0], labels[0]) for _, (_, texts, labels, _) in zip(range(2), loader, strict=False)]
    plain, mixed = asyncio.run(_roll_out(args, tokenizer, prompts))
    actor = Actor(
        name, attn_implementation=args.ds.attn_implementation, experts_implementation=args.ds.experts_implementation,
        param_dtype=args.ds.param_dtype, load_in_4bit=args.ds.load_in_4bit, lora_rank=args.ds.lora.rank,
        lora_alpha=args.ds.lora.alpha, lora_dropout=args.ds.lora.dropout,
        target_modules=args.ds.lora.target_modules, packing_samples=args.ds.packing_samples,
        temperature=args.rollout.temperature, use_liger_kernel=args.ds.use_liger_kernel,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    actor.to(device).eval()

    def differences(responses: list[dict], replay: bool) -> Tensor:
        """|engine's - policy's log-probability| of the tokens that follow a mix, or of all where there are none."""
        found = []
        for response in responses:
            one = SamplesGenerator._process_response_into_experience(None, response, max_len=args.data.max_len)
            sample = response["mm_train_inputs"]
            with torch.no_grad(), replaying(actor, [[sample]]) if replay else nullcontext():
                scored = actor(one.sequences.to(device), one.action_mask.to(device), one.attention_mask.to(device))
            start, end = response["action_ranges"][0][0], one.sequences.shape[1]
            engine = one.rollout_log_probs[0, start - 1 :] if sample is None else sample.logprobs
            difference = (scored[0, start - 1 : end - 1].float().cpu() - engine).abs()
            if sample is not None:
                follows = int(sample.steps[0]) + 1 if len(sample.steps) else end
                difference = difference[follows:]
            found.append(difference)
        return torch.cat(found)

    rows = {
        "plain rollouts": differences(plain, replay=False),
        "mixed, replayed": differences(mixed, replay=True),
        "mixed, plain ids": differences(mixed, replay=False),
    }
    steps = sum(len(response["mm_train_inputs"].steps) for response in mixed)
    print(f"{len(prompts)} prompts, {len(mixed)} mixed rollouts with {steps} mixed steps")
    print("log-probabilities, engine against policy:       tokens  mean |diff|   max |diff|")
    for title, values in rows.items():
        mean, largest = (float(values.mean()), float(values.max())) if len(values) else (float("nan"),) * 2
        print(f"  {title:44} {len(values):7} {mean:12.2e} {largest:12.2e}")
    plain_ones, replayed, ids = rows.values()
    status, text = verdict(plain_ones, replayed, ids, mixes=read_settings()[0].k > 1)  # a mix of one token is the token
    print(text)
    return status


def verdict(plain: Tensor, replayed: Tensor, ids: Tensor, mixes: bool) -> tuple[int, str]:
    """The exit status of a dry run and what it says, of the differences on plain rollouts, on mixed ones, and on mixed
    ones given plain ids. `mixes`: whether a mix is not the anchor alone."""
    if not len(replayed):
        return 1, "no token follows a mixed step: nothing was compared"
    bound = max(2 * float(plain.mean()), 1e-5)
    if not float(replayed.mean()) <= bound:
        return 1, f"NO PARITY: on mixed rollouts the mean is to be at most {bound:.2e}, twice that on plain ones"
    if mixes and not float(ids.mean()) > bound:
        return 1, "INCONCLUSIVE: given plain ids the policy agrees as well, so that a replay cannot be told from none"
    return 0, "parity: the policy agrees with the engine on mixed rollouts as it does on plain ones"


async def _roll_out(args: Any, tokenizer: Any, prompts: list[tuple[str, str]]) -> tuple[list[dict], list[dict]]:
    """Responses without mixes and with them."""
    from openrlhf.trainer.ray import vllm_engine
    from vllm import SamplingParams

    os.environ.setdefault("RAY_ADDRESS", "local")  # else the engine's class asks Ray, which is not running
    kind = vllm_engine.RolloutRayActor.__ray_metadata__.modified_class
    engine = kind.__new__(kind)
    await engine.__init__(
        model=args.actor.model_name_or_path, agent_func_path=args.train.agent_func_path, num_gpus=1,
        seed=args.train.seed, max_model_len=args.data.max_len, dtype="bfloat16", trust_remote_code=True,
        enforce_eager=args.vllm.enforce_eager, gpu_memory_utilization=args.vllm.gpu_memory_utilization,
        distributed_executor_backend="uni", enable_prefix_caching=False, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    settings = SamplingParams(
        temperature=args.rollout.temperature, min_tokens=1, logprobs=1, skip_special_tokens=False,
        max_tokens=min(args.rollout.max_new_tokens or _DRY_TOKENS, _DRY_TOKENS),
    )  # fmt: skip
    count = args.rollout.n_samples_per_prompt

    async def responses(rows: Iterator[int] | None) -> list[dict]:
        found = []
        for prompt, label in prompts:
            found += await engine.generate_responses(
                prompt, label, settings, args.data.max_len, tokenizer, count, images=rows
            )
        return found

    try:
        return await responses(None), await responses(itertools.count())
    finally:
        engine.llm.shutdown()


if __name__ == "__main__":
    # Ray's workers and pickles know this module by its name.
    from ngrpo_ops.integrations import openrlhf

    openrlhf.main()
