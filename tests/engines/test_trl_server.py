"""NGRPOTrainer with a vLLM server: rollouts, weight syncs and replays in a real training loop, and what goes wrong."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from cpu_engine import SETTINGS
from peft import LoraConfig

_spec = importlib.util.spec_from_file_location(
    "trl_server_stand_ins", Path(__file__).with_name("trl_server_cpu") / "sitecustomize.py"
)
assert _spec is not None and _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

from plain_ids import ScoresPlainIds  # noqa: E402
from requests.adapters import HTTPAdapter  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402
from trl_server_cpu.runs import PATH, Server, free_port, make_model, make_trainer  # noqa: E402
from urllib3.util.retry import Retry  # noqa: E402
from vllm import LLM, AsyncEngineArgs, SamplingParams  # noqa: E402
from vllm.usage.usage_lib import UsageContext  # noqa: E402

from ngrpo_ops import MixingConfig, MixRecord, nearest_neighbors  # noqa: E402
from ngrpo_ops.integrations import vllm as adapter  # noqa: E402
from ngrpo_ops.integrations.transformers import NeighborMixing  # noqa: E402
from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer  # noqa: E402
from ngrpo_ops.integrations.vllm import request_seed, server  # noqa: E402
from ngrpo_ops.integrations.vllm.mixed_requests import MixedRequests  # noqa: E402
from ngrpo_ops.integrations.vllm.pool import EntryPool  # noqa: E402
from ngrpo_ops.random import philox  # noqa: E402
from ngrpo_ops.wire import KEY, OPEN, TAKE, read_replies  # noqa: E402

PARITY = 1e-4  # float32
WITHOUT = 1e-2  # what plain ids differ by, at the least
SAMPLED = "sampling/sampling_logp_difference/max"  # TRL's own
SEED = {"generation_kwargs": {"seed": 7}, "vllm_importance_sampling_correction": False}
"""Of a stock trainer, whose requests have no seed, and whose loss is made of tokens alone then."""

OWN_STRATEGY = """
from ngrpo_ops import register_strategy

@register_strategy("served", reads_neighbors=True)
def served(policy):
    ids = policy.neighbors()
    return ids, policy.softmax(ids)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl_server")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return make_model(folder / "model")


def running(servers: dict[str, Server]) -> Iterator[dict[str, Server]]:
    try:
        for one in servers.values():
            one.start()
        yield {name: one.wait() for name, one in servers.items()}
    finally:
        for one in servers.values():
            one.kill()


@pytest.fixture(scope="module")
def servers(model: str, folder: Path) -> Iterator[dict[str, Server]]:
    """One that mixes, and one without the plugin."""
    yield from running(
        {
            "mixing": Server(model, folder / "mixing.log", {"mixing_rate": 0.5}),
            "stock": Server(model, folder / "stock.log", None, VLLM_PLUGINS="none"),
        }
    )


@pytest.fixture(scope="module")
def parallel_servers(model: str, folder: Path) -> Iterator[dict[str, Server]]:
    """One over two workers, with a strategy of a user's own; one of two replicas, which adds noise until a stop id."""
    (folder / "served_strategy.py").write_text(OWN_STRATEGY)
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    own = {"PYTHONPATH": os.pathsep.join([str(folder), PATH])}
    noise = {"mixing_rate": 0.5, "strategy": "gaussian", "sampler": "counter_based", "stop_token_ids": [20, 21, 22, 23]}
    yield from running(
        {
            "tensor": Server(
                model, folder / "tensor.log", {"mixing_rate": 0.5, "strategy": "served_strategy:served"},
                "--tensor-parallel-size", "2", **binding, **own,
            ),
            "data": Server(model, folder / "data.log", noise, "--data-parallel-size", "2", **binding),
        }
    )  # fmt: skip


class Watched:
    """A trainer's class in front of which this stands keeps its completions and the records of its rollouts.

    Attributes:
        changed: for every rollout, of how many tokens the neighbors are others than at the first.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.completions: list[list[list[int]]] = []
        self.records: list[MixRecord] = []
        self.weights: list[torch.Tensor] = []

    def _generate(self, prompts: list) -> Any:
        result = super()._generate(prompts)  # type: ignore[misc]
        self.completions.append(result[1])
        return result

    def _log_rollout(self, record: MixRecord, lengths: torch.Tensor) -> None:
        self.records.append(record)
        self.weights.append(self.model.get_input_embeddings().weight.detach().clone())  # type: ignore[attr-defined]
        super()._log_rollout(record, lengths)  # type: ignore[misc]


class Ours(Watched, ScoresPlainIds):
    pass


class Stock(Watched, GRPOTrainer):
    pass


@pytest.fixture
def train(model: str, tmp_path: Path) -> Iterator[Any]:
    trainers: list[Any] = []

    def make(url: str, trainer: type = Ours, **settings: Any) -> Any:
        config = NGRPOConfig if issubclass(trainer, NGRPOTrainer) else GRPOConfig
        made = make_trainer(trainer, config, model, url, tmp_path / "out", **settings)
        trainers.append(made)
        return made

    def run(url: str, trainer: type = Ours, **settings: Any) -> Any:
        made = make(url, trainer, **settings)
        made.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
        return made

    run.make = make  # type: ignore[attr-defined]
    yield run
    for trained in trainers:
        if hasattr(trained.vllm_generation, "vllm_client"):
            trained.vllm_generation.vllm_client.close_communicator()


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def assert_parity(trainer: Any, rollouts: int = 3) -> float:
    metric, errors = logged(trainer, SAMPLED), logged(trainer, "mix/replay_error")
    assert len(metric) == len(errors) == rollouts
    assert max(metric) <= PARITY and max(errors) <= PARITY and trainer.plain_difference > WITHOUT
    assert all(0.2 < share < 0.8 for share in logged(trainer, "mix/gated_share"))
    return max(metric)


def assert_neighbors_of_the_weights(trainer: Any) -> None:
    """Every mixed step's candidates are the neighbors that its anchor has by the weights just synced."""
    words = torch.arange(len(trainer.weights[0])) > 2  # no special tokens
    tables = [nearest_neighbors(weight, 2, allowed=words).ids.sort(1).values for weight in trainer.weights]
    for record, table in zip(trainer.records, tables, strict=True):
        candidates = record.ids[record.gate]
        assert len(candidates) > 8
        assert torch.equal(candidates[:, 1:].sort(1).values, table[candidates[:, 0]])
    assert (tables[0] != tables[-1]).any()


# Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(model: str, servers: dict[str, Server], folder: Path) -> Any:
    """Three steps that several tests look at."""
    made = make_trainer(
        Ours, NGRPOConfig, model, servers["mixing"].url, folder / "out", mixing_rate=0.5, learning_rate=3e-2
    )
    made.train()
    made.vllm_generation.vllm_client.close_communicator()
    return made


def test_the_server_and_the_policy_agree(trained: Any, difference: Any) -> None:
    """Over three steps with a weight sync before each, by TRL's own metric and by ours."""
    difference("trl, server", assert_parity(trained), trained.plain_difference)
    assert_neighbors_of_the_weights(trained)
    for record, completions in zip(trained.records, trained.completions, strict=True):
        for row, tokens in enumerate(completions):
            gate = record.gate[row, : len(tokens)]
            assert torch.equal(record.ids[row, : len(tokens), 0][gate], torch.tensor(tokens)[gate])
            assert not record.gate[row, len(tokens) :].any()


def test_without_the_replay_both_metrics_are_large(
    train: Any, servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NeighborMixing, "replay", lambda self, record, model=None: nullcontext())
    trainer = train(servers["mixing"].url, mixing_rate=0.5, max_steps=2)
    assert min(max(logged(trainer, SAMPLED)), max(logged(trainer, "mix/replay_error"))) > WITHOUT


def test_rows_are_those_of_the_colocated_engine(train: Any, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = vllm_generation.LLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs | {name: SETTINGS[name] for name in ("enforce_eager", "dtype")})

    monkeypatch.setattr(vllm_generation.LLM, "__init__", init)
    colocated = train(
        "", mixing_rate=0.5, vllm_mode="colocate", vllm_max_model_length=64, vllm_gpu_memory_utilization=0.1,
        learning_rate=3e-2,
    )  # fmt: skip
    assert colocated.completions == trained.completions
    for ours, theirs in zip(trained.records, colocated.records, strict=True):
        assert torch.equal(ours.gate, theirs.gate)
        assert torch.equal(ours.ids[ours.gate], theirs.ids[theirs.gate])
    colocated.vllm_generation.llm.llm_engine.engine_core.shutdown()


def test_a_stock_trainer_and_rate_zero_are_stock_on_a_mixing_server(train: Any, servers: dict[str, Server]) -> None:
    stock = train(servers["stock"].url, Stock, max_steps=2, **SEED)
    on_mixing = train(servers["mixing"].url, Stock, max_steps=2, **SEED)
    ours = train(servers["stock"].url, Ours, max_steps=2, mixing_rate=0.0, **SEED)
    for other in (on_mixing, ours):
        assert other.completions == stock.completions
        for name in ("reward", "loss", "grad_norm"):
            assert len(logged(stock, name)) == 2 and logged(other, name) == logged(stock, name), name
        for (key, a), b in zip(stock.model.state_dict().items(), other.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
    assert not ours.records


def test_evaluation_does_not_mix(train: Any, servers: dict[str, Server]) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["w3 w4", "w5"]})
    trainer = train(
        servers["mixing"].url, mixing_rate=0.5, max_steps=2, eval_dataset=data, eval_strategy="steps", eval_steps=1
    )
    assert len(logged(trainer, "eval_reward")) == 2 and len(trainer.records) == 2
    assert max(logged(trainer, "eval_sampling/sampling_logp_difference/max")) <= PARITY  # and nothing is replayed
    assert_parity(trainer, 2)
    assert not any(name.startswith("eval_mix/") for entry in trainer.state.log_history for name in entry)


def test_a_resumed_run_is_the_uninterrupted_one(
    train: Any, servers: dict[str, Server], tmp_path: Path, difference: Any
) -> None:
    settings = {"mixing_rate": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings["vllm_importance_sampling_correction"] = False  # of the engine's rounding, see below
    whole = train(servers["mixing"].url, **settings)
    resumed = train(servers["mixing"].url, **settings, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.completions == whole.completions[2:]
    # What the server adds up in another order, as requests come in, is the last bits of the weights of the mixes.
    for ours, theirs in zip(resumed.records, whole.records[2:], strict=True):
        assert torch.equal(ours.gate, theirs.gate) and torch.equal(ours.ids[ours.gate], theirs.ids[theirs.gate])
        assert torch.allclose(ours.weights[ours.gate], theirs.weights[theirs.gate], atol=1e-5)
    for name in ("loss", "grad_norm", "reward", "mix/gated_share"):
        assert logged(resumed, name)[-2:] == pytest.approx(logged(whole, name)[-2:], rel=1e-4, abs=1e-6), name
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), key
    difference("trl, server, after resume", max(logged(resumed, "mix/replay_error")[-2:]), resumed.plain_difference)
    assert max(logged(resumed, "mix/replay_error")) <= PARITY


LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), "learning_rate": 5e-2}


def test_lora(train: Any, servers: dict[str, Server], difference: Any) -> None:
    trainer = train(servers["mixing"].url, mixing_rate=0.5, **LORA)
    difference("trl, server, lora", assert_parity(trainer), trainer.plain_difference)


def test_trl_still_sends_the_last_weights_without_the_adapter(train: Any, servers: dict[str, Server]) -> None:
    """Why `patch_update_named_params` copies. When this fails TRL or vLLM has mended it: remove the patch."""
    assert max(logged(train(servers["stock"].url, Stock, **LORA), SAMPLED)) > WITHOUT


def test_two_ranks(model: str, servers: dict[str, Server], trained: Any, tmp_path: Path, difference: Any) -> None:
    """Both are refused, train on their own rows of one rollout, and stop, together."""
    (tmp_path / "model").symlink_to(model)
    script = Path(__file__).with_name("trl_server_cpu") / "two_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*command, str(script), str(tmp_path), servers["mixing"].url, str(free_port())],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank, seen in enumerate(ranks):
        mixes, gone, failed = seen["refused"]
        assert "ValueError" in mixes and "mixing_rate=0.5, not 0.25" in mixes
        assert "ConnectionError" in gone and "no vLLM server at http://127.0.0.1:1" in gone
        assert "failed in a rollout: division by zero" in failed
        for rollout, gates in enumerate(seen["gates"]):
            rows = torch.arange(4) + 8 * rollout + 4 * rank
            gates = torch.tensor(gates)
            words = torch.stack([philox(torch.tensor(42), rows, torch.tensor(s))[0] for s in range(gates.shape[1])], 1)
            inside = torch.tensor(
                [[s < len(tokens) for s in range(gates.shape[1])] for tokens in seen["completions"][rollout]]
            )
            assert torch.equal(gates, (words < 2**31) & inside)
        assert seen["completions"][0] == trained.completions[0][4 * rank : 4 * rank + 4]  # those of one process
    for log in ranks[0]["logs"]:
        assert max(log["mix/replay_error"], log[SAMPLED]) <= PARITY
        difference("trl, server, two ranks", log[SAMPLED], max(seen["plain"] for seen in ranks))


def test_tensor_parallel(
    train: Any, trained: Any, parallel_servers: dict[str, Server], folder: Path, monkeypatch: Any, difference: Any
) -> None:
    """With a strategy of a user's own, which does what ours does."""
    monkeypatch.syspath_prepend(folder)
    trainer = train(
        parallel_servers["tensor"].url, mixing_rate=0.5, mixing_strategy="served_strategy:served", learning_rate=3e-2
    )
    difference("trl, server, tensor parallel", assert_parity(trainer), trainer.plain_difference)
    assert_neighbors_of_the_weights(trainer)
    assert trainer.completions[0] == trained.completions[0]


def test_data_parallel_with_noise_and_stop_ids(
    train: Any, parallel_servers: dict[str, Server], difference: Any
) -> None:
    trainer = train(
        parallel_servers["data"].url, mixing_rate=0.5, mixing_strategy="gaussian", mixing_sampler="counter_based",
        mixing_stop_token_ids=[20, 21, 22, 23], top_p=0.9, temperature=0.8,
    )  # fmt: skip
    errors = logged(trainer, "mix/replay_error")  # TRL's own compares with the log-probabilities of what top_p left
    assert len(errors) == 3 and max(errors) <= PARITY
    difference("trl, server, data parallel, gaussian with stop ids", max(errors), trainer.plain_difference)
    for record, completions in zip(trainer.records, trainer.completions, strict=True):
        assert record.noise_scale is not None and record.gate.any()
        for row, tokens in enumerate(completions):
            stopped = np.cumsum([token in (20, 21, 22, 23) for token in tokens])
            assert not record.gate[row, 1 : len(tokens)][torch.from_numpy(stopped[:-1] > 0)].any()
    every, tokens = list(range(16, 24)), trainer.completions[-1]
    replies = ask(parallel_servers["data"], TAKE, trainer._server.run, 16, 24, every, [len(row) for row in tokens])
    assert len(replies) == 2 and all(reply["rows"] for reply in replies)  # of both replicas
    assert torch.equal(read_replies(replies, every, tokens).gate, trainer.records[-1].gate)


# The plugin in a server -------------------------------------------------------------------------------------------


def ask(to: Server, method: str, *arguments: Any) -> Any:
    answer = requests.post(f"{to.url}/collective_rpc", json={"method": method, "args": arguments}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def complete(to: Server, row: Any, **settings: Any) -> requests.Response:
    body = {"model": to.model, "prompt": [[5, 6, 7]], "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    return requests.post(
        f"{to.url}/v1/completions", json=body | {"vllm_xargs": {KEY: row}} | settings, timeout=60
    )  # fmt: skip


@pytest.mark.parametrize("row", ["3", 1.5, [1, 2], 2**63, 2**63 - 1, {"row_id": 3}])
def test_bad_row_ids_are_answered_with_their_reason(servers: dict[str, Server], row: Any) -> None:
    answer = complete(servers["mixing"], row, n=2)
    assert answer.status_code == 400, answer.text
    assert ("request_kwargs" in answer.text or "64 bits" in answer.text) != isinstance(row, dict)
    assert complete(servers["mixing"], 5).status_code == 200  # the server lives on


def test_taking_again_gives_the_same(servers: dict[str, Server]) -> None:
    to = servers["mixing"]
    (opened,) = ask(to, OPEN, "me", 3)
    assert opened["config"]["seed"] == 3 and opened["config"]["excluded_token_ids"] == "special"
    tokens = [choice["token_ids"] for choice in complete(to, 2**60, n=3).json()["choices"]]
    rows = [2**60 + i for i in range(3)]
    (first,) = ask(to, TAKE, "me", 2**60, 2**60 + 3, rows, [8] * 3)
    assert ask(to, TAKE, "me", 2**60, 2**60 + 3, rows, [8] * 3) == [first]
    gates = read_replies([first], rows, tokens).gate
    words = [philox(torch.tensor(3), torch.tensor(rows), torch.tensor(step))[0] for step in range(8)]
    assert torch.equal(gates, torch.stack(words, 1) < 2**31)
    # Each sequence is what a request of its own would be.
    again = [complete(to, row, seed=request_seed(3, row)).json()["choices"][0]["token_ids"] for row in rows]
    assert again == tokens
    complete(to, 5)  # a step, in which what has finished leaves its slot
    for others in ((2**60 + 1, 2**60 + 9), (0, 1)):
        (reply,) = ask(to, TAKE, "me", *others, rows, [8] * 3)
        assert reply["rows"] == [row for row in rows if others[0] <= row < others[1]]
    assert "another trainer" in ask(to, TAKE, "you", 0, 1, [], [])[0]["error"][1]


class Proxy(ThreadingHTTPServer):
    """Stands between a trainer and a server, and does to the first request of a kind what `accidents` says of it."""

    def __init__(self, to: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.to, self.url = to, f"http://127.0.0.1:{self.server_address[1]}"
        self.accidents: dict[str, float | None] = {}  # seconds until the connection breaks; None: after the reply
        self.happened: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Forward(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.forward("GET")

    def do_POST(self) -> None:
        self.forward("POST")

    def forward(self, verb: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = f"{self.path} {body.decode()}"
        accident: tuple = ()
        with self.server.lock:
            kind = next((name for name in self.server.accidents if name in text and "[]" not in text), None)
            if kind is not None:
                accident = (self.server.accidents.pop(kind),)
                self.server.happened.append(kind)
        try:
            answer = requests.request(
                verb, f"{self.server.to}{self.path}", data=body, headers={"Content-Type": "application/json"},
                timeout=accident[0] if accident and accident[0] else 60,
            )  # fmt: skip
        except requests.Timeout:
            answer = None
        if accident or answer is None:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: Any) -> None:
        pass


def test_dropped_requests_and_lost_replies_change_nothing(train: Any, trained: Any, servers: dict[str, Server]) -> None:
    proxy = Proxy(servers["mixing"].url)
    trainer = train.make(proxy.url, mixing_rate=0.5, max_steps=2, learning_rate=3e-2)
    # A request that breaks off while it is decoded, and replies that do not arrive, of tokens and of records.
    proxy.accidents = {"/v1/completions": 0.1, TAKE: None, '"n": 4': None}
    trainer.train()
    assert sorted(proxy.happened) == sorted(["/v1/completions", TAKE, '"n": 4'])
    assert_parity(trainer, 2)
    assert trainer.completions[0] == trained.completions[0]
    proxy.shutdown()


def test_refused_at_the_start(train: Any, servers: dict[str, Server], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="VLLM_PLUGINS"):
        train(servers["stock"].url, mixing_rate=0.5)
    with pytest.raises(ValueError, match=r"mixing_rate=0.5, not 0.25.*vllm serve .*mixing_rate"):
        train(servers["mixing"].url, mixing_rate=0.25)
    with pytest.raises(ConnectionError, match="vllm_server_timeout=1 "):
        train("http://127.0.0.1:1", mixing_rate=0.5, vllm_server_timeout=1.0)
    from models import tiny_model

    other = tiny_model(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128)
    with pytest.raises(ValueError, match="another model than the trainer: hidden_size=128, not 256"):
        make_trainer(NGRPOTrainer, NGRPOConfig, other, servers["mixing"].url, tmp_path, mixing_rate=0.5)


def test_a_trainer_that_comes_takes_the_server(train: Any, servers: dict[str, Server]) -> None:
    """Two trainers on one server would push their weights over each other's."""
    first = train.make(servers["mixing"].url, mixing_rate=0.5)
    train.make(servers["mixing"].url, mixing_rate=0.5)
    with pytest.raises(RuntimeError, match="another trainer has begun to use the server"):
        first.train()


def test_servers_that_would_not_mix_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When they are configured, in the process that serves HTTP."""
    adapter.register()

    def configured(**settings: Any) -> Any:
        given = {"max_model_len": 64, "additional_config": {KEY: {"mixing_rate": 0.5}}, "dtype": "float32"}
        return AsyncEngineArgs(model, **given | settings).create_engine_config(UsageContext.OPENAI_API_SERVER)

    config = configured()
    assert not config.cache_config.enable_prefix_caching
    assert config.additional_config[KEY] == {"mixing_rate": 0.5, "excluded_token_ids": "special"}
    with pytest.raises(ValueError, match="enable_prefix_caching cannot be mixed"):
        configured(enable_prefix_caching=True)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_USE_RUST_FRONTEND", "1")
        with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
            configured()
    mixing = MixingConfig(mixing_rate=0.5)
    adapter.refuse_engine(config, mixing, served=True)
    config.parallel_config.data_parallel_size = 2
    adapter.refuse_engine(config, mixing, served=True)
    with pytest.raises(ValueError, match="data_parallel_size > 1 cannot be mixed"):
        adapter.refuse_engine(config, mixing)
    with monkeypatch.context() as patch:
        patch.setattr(type(config.model_config), "is_moe", True)
        with pytest.raises(ValueError, match="mixture of experts"):
            adapter.refuse_engine(config, mixing, served=True)
    config.parallel_config.data_parallel_hybrid_lb = True
    with pytest.raises(ValueError, match="data_parallel_hybrid_lb"):
        adapter.refuse_engine(config, mixing, served=True)


def test_workers_that_do_not_mix_say_so() -> None:
    worker = SimpleNamespace(model_runner=SimpleNamespace(model_state=SimpleNamespace()))
    assert "not started to mix" in server.open_mix_records(worker, "me", 0)["error"][1]
    assert "knows no trainer" in server.take_mix_records_json(worker, "me", 0, 1, [], [])["error"][1]


def test_one_worker_of_a_tensor_parallel_group_replies_and_all_forget() -> None:
    forgotten: list[range] = []
    mixer = SimpleNamespace(run="me", requests=SimpleNamespace(forget_outside=forgotten.append))
    worker = SimpleNamespace(
        rank=1, parallel_config=SimpleNamespace(world_size=2),
        model_runner=SimpleNamespace(model_state=SimpleNamespace(mixer=mixer)),
    )  # fmt: skip
    assert server.take_mix_records_json(worker, "me", 3, 5, [3], [1]) is None
    assert forgotten == [range(3, 5)]


def test_faults_come_out_of_a_server(model: str) -> None:
    """Logits that are no distribution, and the same engine asked in the form of HTTP without it."""
    settings = SETTINGS | {"max_model_len": 64, "max_num_seqs": 8}
    llm = LLM(model, **settings, **adapter.engine_kwargs(MixingConfig(mixing_rate=0.5)))
    (opened,) = llm.collective_rpc(OPEN, args=("me", 5))
    assert opened["model"] == {"vocab_size": 67, "hidden_size": 128, "num_hidden_layers": 2}
    asked = SamplingParams(max_tokens=4, detokenize=False, ignore_eos=True, extra_args={KEY: 3})
    llm.generate({"prompt_token_ids": [5]}, asked, use_tqdm=False)
    (reply,) = llm.collective_rpc(TAKE, args=("me", 0, 9, [3, 4], [9, 1]))
    assert reply["rows"] == [] and reply["shorter"] == [[3, 4]]
    head = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.lm_head.weight
    with torch.inference_mode():
        head[:, 0] = torch.nan
    llm.generate({"prompt_token_ids": [5]}, asked, use_tqdm=False)
    (reply,) = llm.collective_rpc(TAKE, args=("me", 0, 9, [3], [4]))
    assert reply["error"][0] == "RuntimeError" and "row 3" in reply["error"][1]
    llm.llm_engine.engine_core.shutdown()


# A row that is asked for again --------------------------------------------------------------------------------------


def requests_of(slots: int = 4) -> MixedRequests:
    return MixedRequests(MixingConfig(mixing_rate=1.0), slots, 16, EntryPool(3, torch.device("cpu")))


def start(requests: MixedRequests, slot: int, req_id: str, row: int, steps: int, generated: int = 0) -> None:
    """A request with a prompt of two tokens gets a slot and samples some steps."""
    given = SimpleNamespace(req_id=req_id, prompt_len=2, prefill_token_ids=[0] * (2 + generated))
    requests.add(slot, given, row, replaces=True)
    sample(requests, slot, generated, steps)


def sample(requests: MixedRequests, slot: int, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        batch = SimpleNamespace(
            idx_mapping_np=np.array([slot]), num_computed_tokens_np=np.array([1 + step]),
            num_scheduled_tokens=np.array([1]), prefill_len_np=np.array([2]),
        )  # fmt: skip
        assert len(requests.sampled(batch)) == 1


@pytest.mark.parametrize("order", ["finished", "before", "after"])
def test_the_later_request_has_the_row(order: str) -> None:
    """Whether the earlier one had finished, or ends before or after the later one does."""
    requests = requests_of()
    start(requests, 0, "first", 7, 2)
    if order == "finished":
        requests.remove("first")
    start(requests, 1, "again", 7, 3)
    if order == "before":
        requests.remove("first")
        requests.remove("again")
    if order == "after":
        requests.remove("again")
        requests.find([7], [3])
        requests.remove("first")
    assert requests.steps([7, 8]) == {7: 3}
    requests.find([7], [3])
    requests.forget_outside(range(8, 9))
    assert requests.steps([7]) == ({7: 3} if order == "finished" else {})  # it still has its slot
    requests.remove("again")
    requests.forget_outside(range(0))
    assert len(requests.pool._free) == len(requests.pool.gate)  # nothing leaks
    assert not requests.kept and not requests._replaced


@pytest.mark.parametrize("generated", [0, 2])
def test_a_replaced_request_that_goes_on_after_a_preemption_stays_replaced(generated: int) -> None:
    requests = requests_of()
    start(requests, 0, "first", 7, generated)
    start(requests, 1, "again", 7, 3)
    requests.remove("first")  # preempted
    start(requests, 2, "first", 7, 4, generated)
    assert requests.steps([7]) == {7: 3}
    requests.remove("again")
    requests.remove("first")
    assert requests.steps([7]) == {7: 3}
    preempted = requests_of()
    start(preempted, 0, "first", 7, generated)
    preempted.remove("first")
    start(preempted, 1, "again", 7, 3)
    start(preempted, 2, "first", 7, 4, generated)
    assert preempted.steps([7]) == {7: 3}
    finished = requests_of()
    start(finished, 0, "first", 7, generated)
    start(finished, 1, "again", 7, 3)
    finished.remove("first")  # preempted
    finished.remove("again")
    start(finished, 2, "first", 7, 4, generated)
    assert finished.steps([7]) == {7: 3}


def test_a_request_that_goes_on_after_a_preemption_keeps_its_steps() -> None:
    requests = requests_of()
    start(requests, 0, "first", 7, 2)
    requests.remove("first")
    start(requests, 3, "first", 7, 2, generated=2)
    assert requests.steps([7]) == {7: 4}


# The end of a server ------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_in_a_step_and_started_anew_stops_the_training(
    train: Any, servers: dict[str, Server]
) -> None:
    """The last test: the server's weights are its checkpoint's then, and nobody else would notice."""
    killed = servers["mixing"]
    trainer = train.make(killed.url, mixing_rate=0.5)
    client = trainer.vllm_generation.vllm_client
    # TRL's client tries for a minute. Here until the server is there again, on a machine of any speed.
    patient = Retry(total=300, connect=300, read=300, allowed_methods=["POST", "GET"], backoff_factor=1, backoff_max=1)
    client.session.mount(killed.url, HTTPAdapter(max_retries=patient))
    generate, calls = client.generate, itertools.count(1)

    def dies(**settings: Any) -> Any:
        if next(calls) == 3:  # the second rollout's first prompt
            killed.kill()
            killed.start()
        return generate(**settings)

    client.generate = dies
    with pytest.raises(RuntimeError, match="failed in a rollout: the server knows no trainer: it was started anew"):
        trainer.train()
    assert trainer.state.global_step == 1
