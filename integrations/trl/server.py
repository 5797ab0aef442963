"""Runs in the trainer's process: the rollouts of ``vllm_mode="server"``, in a vLLM server that mixes.

The main process talks to the server, with TRL's own client. What comes of it, an error too, is told to all processes,
so that none of them waits for another that has stopped.
"""

from __future__ import annotations

import json
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import requests
import trl
from accelerate.utils import broadcast_object_list
from requests.adapters import HTTPAdapter
from torch import Tensor
from trl.generation.vllm_client import VLLMClient

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops._patching import check_signature, replaced, wrap
from ngrpo_ops.versions import tested
from ngrpo_ops.wire import KEY, OPEN, SERVED_DEFAULTS, TAKE, raise_errors, read_opened, read_replies

T = TypeVar("T")

# Requests at a time, one a prompt. Each has several completions, and an engine runs a thousand sequences at most by
# default, so that it does not wait for more.
_CONCURRENCY = 512
_INTERVAL = 2.0  # seconds between two looks for a server that is starting
_TRAINERS_OWN = ("loss_on_mixed_steps", "seed")  # the seed is told to the server
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "ConnectionError": ConnectionError}
_NOTHING: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "logprob_token_ids": []}

EXPECTED_PARAMETERS = {
    "generate": ["self", "prompts", "features", "n"],
    "update_named_params": ["self", "metadata", "named_params"],
}
"""The methods of TRL's VLLMClient that a rollout replaces or wraps, each with its first parameters."""


def told_to_all(is_main: bool, task: Callable[[], T]) -> T:
    """What the main process makes of a task, on every process.

    Args:
        is_main: whether this is the main process. The others do not run the task.

    Returns:
        The task's result, which is pickled.

    Raises:
        ValueError, ConnectionError, RuntimeError: the task's error, of the nearest of these types.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main:
        try:
            outcome = [task(), None]
        except Exception as error:
            failure = error
            kind = next((name for name, known in _ERRORS.items() if isinstance(error, known)), "RuntimeError")
            outcome = [None, (kind, str(error))]
    broadcast_object_list(outcome, from_process=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        kind, message = outcome[1]
        raise _ERRORS.get(kind, RuntimeError)(message)
    return outcome[0]


def server_command(config: MixingConfig, model: str) -> str:
    """The command that starts a server for a trainer.

    Args:
        config: the trainer's mixing.
        model: the checkpoint.

    Examples:
        >>> from ngrpo_ops.integrations.trl import NGRPOConfig
        >>> from ngrpo_ops.integrations.trl.server import server_command
        >>> config = NGRPOConfig("out", use_cpu=True, bf16=False, mixing_rate=0.2).mixing()
        >>> server_command(config, "Qwen/Qwen3-0.6B").split(" --")[-1]
        'additional-config \\'{"ngrpo_ops": {"mixing_rate": 0.2}}\\''
    """
    defaults = asdict(MixingConfig()) | SERVED_DEFAULTS
    fields = {"mixing_rate": config.mixing_rate} | {
        name: value for name, value in asdict(config).items() if name not in _TRAINERS_OWN and value != defaults[name]
    }
    arguments = ["vllm", "serve", model, "--weight-transfer-config", json.dumps({"backend": "nccl"})]
    arguments += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join([*arguments, '--additional-config', json.dumps({KEY: fields})])}"


class MixingServer:
    """The vLLM server of a training run.

    Args:
        args: the trainer's `NGRPOConfig`.
        config: the mixing.
        model: the checkpoint's name, for messages.

    Attributes:
        client: the trainer's own client, on the main process, once the trainer is there.

    Raises:
        ImportError: TRL has changed its client.
        ConnectionError: there is no server within `args.vllm_server_timeout` seconds.
        ValueError: the server does not mix, or mixes otherwise. The message has the command to start it with.
    """

    def __init__(self, args: Any, config: MixingConfig, model: str) -> None:
        for name, expected in EXPECTED_PARAMETERS.items():
            where, framework = f"VLLMClient.{name}", f"TRL {trl.__version__}"
            check_signature(VLLMClient, name, expected, framework, tested("trl"), prefix=True, where=where)
        self.run = uuid.uuid4().hex
        self.config, self.model = config, model
        self._rank, self._processes = args.process_index, args.world_size
        self._is_main = self._rank == 0
        self.url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        self.client: Any = None

        def connect() -> dict[str, Any]:
            self._await(args.vllm_server_timeout)
            return self._open()

        self._opened = told_to_all(self._is_main, connect)

    def attach(self, trainer: Any) -> None:
        """Takes the trainer's own client, when the trainer is there.

        Raises:
            ValueError: the server has another model than the trainer.
        """
        text = trainer.model.config.get_text_config()
        ours = {name: getattr(text, name) for name in self._opened["model"]}
        if different := _differences(self._opened["model"], ours):
            raise ValueError(f"the vLLM server has another model than the trainer: {different}")
        if not self._is_main:
            return
        self.client = trainer.vllm_generation.vllm_client
        session = self.client.session
        # As many connections as requests at a time: those beyond are closed with a warning each.
        retries = session.get_adapter(self.url).max_retries
        session.mount(self.url, HTTPAdapter(max_retries=retries, pool_maxsize=_CONCURRENCY))
        if hasattr(trainer.model, "merge_adapter"):
            wrap(self.client, "update_named_params", patch_update_named_params)

    # The start

    @property
    def _advice(self) -> str:
        return f"start it with: {server_command(self.config, self.model)}"

    def _await(self, timeout: float) -> None:
        """Waits until the server is up. TRL's client waits too, but without end where something else answers."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                status = requests.get(f"{self.url}/health", timeout=max(_INTERVAL, timeout)).status_code
                if status == 200:
                    return
                found = f"it answers with {status}"
            except requests.RequestException as error:
                found = str(error)
            if time.monotonic() + _INTERVAL > deadline:
                raise ConnectionError(
                    f"there is no vLLM server at {self.url} within vllm_server_timeout={timeout:g} seconds ({found}): "
                    f"{self._advice}"
                )
            time.sleep(_INTERVAL)

    def _open(self) -> dict[str, Any]:
        """What the server says about itself, once it mixes as the trainer does and for this trainer alone."""
        url, advice = self.url, self._advice
        try:
            # Not in the client's session, which would repeat an error of 500 for seconds, and lose its text.
            answer = requests.post(
                f"{url}/collective_rpc", json={"method": OPEN, "args": [self.run, self.config.seed]}, timeout=60
            )
        except requests.RequestException as error:
            raise ConnectionError(f"the vLLM server at {url} does not say whether it mixes: {error}") from error
        if answer.status_code == 404:
            raise ValueError(
                f"the vLLM server at {url} has no development endpoints, by which weights come in and records go out: "
                f"{advice}"
            )
        if answer.status_code != 200:
            raise ValueError(
                f"the vLLM server at {url} has no method {OPEN} ({answer.status_code}: {answer.text[:200]}): the "
                "plugin 'ngrpo_ops' was not loaded in it, or is another version's: is this version of ngrpo-ops "
                f"installed there, and is it among VLLM_PLUGINS where that is set? Then {advice}"
            )
        try:
            opened = read_opened(answer.json()["results"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the vLLM server at {url} does not mix ({error}): {advice}") from error
        ours = json.loads(json.dumps(asdict(self.config)))  # lists for tuples
        for name in _TRAINERS_OWN:
            del ours[name]
        if different := _differences(opened["config"], ours):
            raise ValueError(f"the vLLM server at {url} mixes otherwise ({different}): {advice}")
        if opened["enable_prefix_caching"]:
            raise ValueError(
                f"the vLLM server at {url} has prefix caching on, whose blocks are found by token ids alone: {advice}"
            )
        return opened

    # Rollouts

    @contextmanager
    def rollouts(self, row_ids: Tensor) -> Iterator[list[MixRecord]]:
        """Within it the client's requests are mixed. The list yielded gains the record of `row_ids` at the end.

        Args:
            row_ids: int64 [B], consecutive: the rows of this process.

        Raises:
            RuntimeError: on all processes: the server failed, was started anew or is another trainer's, or a record is
                not there.
        """
        rows, here = len(row_ids), int(row_ids[0])
        first = here - self._rank * rows
        every = range(first, first + self._processes * rows)
        # Before weights are sent to the server: sent to one that was started anew they would be waited for in vain.
        told_to_all(self._is_main, lambda: self._explained(lambda: raise_errors(self._replies(every, [], []))))
        records: list[MixRecord] = []
        if not self._is_main:
            yield records
            found = told_to_all(False, list[MixRecord])
        else:
            taken: list[MixRecord] = []
            failures: list[Exception] = []

            def generate(prompts: list, features: Any = None, n: int = 1, **settings: Any) -> dict[str, Any]:
                try:
                    output, record = self._explained(lambda: self._generate(original, every, prompts, n, settings))
                except RuntimeError as error:
                    failures.append(error)  # raised below, on all processes: TRL's others wait for an answer now
                    return _NOTHING
                taken.append(record)
                return output

            def outcome() -> list[MixRecord]:
                if failures:
                    raise failures[0]
                return taken

            with replaced(self.client, "generate", generate) as original:
                yield records
            found = told_to_all(True, outcome)
        records += [record[here - first : here - first + rows] for record in found]

    def _generate(
        self, generate: Callable, every: range, prompts: list, n: int, settings: dict[str, Any]
    ) -> tuple[dict[str, Any], MixRecord]:
        """The client's `generate`, a request a prompt, and the record of all completions, prompt by prompt."""
        if len(prompts) * n != len(every):
            raise RuntimeError(f"TRL asks for {len(prompts)} x {n} completions, expected {len(every)}")
        given = settings.pop("generation_kwargs", None) or {}

        def ask(index: int) -> tuple[dict[str, Any], MixRecord]:
            rows = every[index * n : (index + 1) * n]
            more = {**given, "vllm_xargs": {KEY: rows[0]}}
            output = generate(prompts=prompts[index : index + 1], n=n, generation_kwargs=more, **settings)
            # Here, where it is hidden behind the decoding of other prompts.
            return output, self._take(every, rows, output["completion_ids"])

        pool = ThreadPoolExecutor(min(_CONCURRENCY, len(prompts)))
        try:
            asked = [pool.submit(ask, index) for index in range(len(prompts))]
            done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            answers = [one.result() for one in asked if one in done]  # raises the first error
        finally:
            # An error does not wait for prompts that are still decoded.
            pool.shutdown(wait=False, cancel_futures=True)
        outputs, records = zip(*answers, strict=True)
        joined = {
            name: None if value is None else [item for output in outputs for item in output[name]]
            for name, value in outputs[0].items()
        }
        return joined, MixRecord.cat(records)

    def _take(self, every: range, row_ids: Sequence[int], completions: list[list[int]]) -> MixRecord:
        """The record of finished rows."""
        return read_replies(self._replies(every, row_ids, completions), row_ids, completions)

    def _replies(self, every: range, row_ids: Sequence[int], completions: list[list[int]]) -> list[Any]:
        """The server's replies to `TAKE`. The client's session asks again where a reply is lost."""
        arguments = [self.run, every.start, every.stop, list(row_ids), [len(tokens) for tokens in completions]]
        answer = self.client.session.post(f"{self.url}/collective_rpc", json={"method": TAKE, "args": arguments})
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}, {answer.text}")
        return answer.json()["results"]

    def _explained(self, task: Callable[[], T]) -> T:
        """The task's result.

        Raises:
            RuntimeError: the task's error, with what to do.
        """
        try:
            return task()
        except Exception as error:
            raise RuntimeError(
                f"the vLLM server at {self.url} failed in a rollout: {error}. Once its cause is gone, start the server "
                "anew if it is not running, and resume from the last checkpoint"
            ) from error


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={theirs.get(name)!r}, not {value!r}" for name, value in ours.items() if theirs.get(name) != value
    )


def patch_update_named_params(original: Callable) -> Callable:
    """VLLMClient.update_named_params: with LoRA, what is sent is a copy.

    TRL merges the adapter in place and takes it out again when its generator ends. vLLM packs the last tensors after
    that, and would send them without the adapter.
    """

    def update_named_params(metadata: list, named_params: Any) -> Any:
        return original(metadata, ((name, tensor.clone()) for name, tensor in named_params))

    return update_named_params
