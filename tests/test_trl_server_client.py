"""The trainer's side of TRL's server mode. HTTP and TRL's client are real, the engine that answers is made up."""

from __future__ import annotations

import doctest
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient
from urllib3.util.retry import Retry

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.integrations.trl import NGRPOConfig
from ngrpo_ops.integrations.trl import server as adapter
from ngrpo_ops.integrations.trl.checks import refuse_settings
from ngrpo_ops.wire import FORMAT, OPEN, TAKE, error_reply, pack_reply, raise_errors, read_opened, read_replies

pytestmark = pytest.mark.skipif(
    "features" not in inspect.signature(VLLMClient.generate).parameters,
    reason="this TRL's server is its own and not vLLM's: it is refused",
)

SHAPE = {"vocab_size": 67, "hidden_size": 8, "num_hidden_layers": 2}


class Engine(ThreadingHTTPServer):
    """What a vLLM server that mixes says, and what goes wrong on the way: `lose` names replies that do not arrive.

    Attributes:
        replies: paths and the replies to them, instead of its own.
        asked: the bodies of the requests by path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.replies: dict[str, tuple[int, Any]] = {}
        self.lose: list[str] = []
        self.asked: dict[str, list[dict]] = {"/v1/completions": [], "/collective_rpc": []}
        self.run: str | None = None
        self.config: dict[str, Any] = {}
        self.tokens: dict[int, list[int]] = {}  # by row
        self.lock = threading.Lock()
        self.answers = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: dict) -> tuple[int, Any]:
        if path in self.replies:
            return self.replies[path]
        if path == "/health":
            return 200, {}
        if path == "/v1/completions":
            return 200, {"choices": [choice for prompt in body["prompt"] for choice in self.complete(prompt, body)]}
        arguments = body["args"]
        if body["method"] == OPEN:
            self.run = arguments[0]
            return 200, {"results": [self.opened(arguments[1])]}
        assert body["method"] == TAKE
        if self.run is None:
            return 200, {"results": [error_reply(RuntimeError("the server knows no trainer"))]}
        if self.run != arguments[0]:
            return 200, {"results": [error_reply(RuntimeError("another trainer"))]}
        rows = [row for row in arguments[3] if row in self.tokens]
        return 200, {"results": [pack_reply(record_of(self.tokens, rows), rows, [self.tokens[r] for r in rows], {})]}

    def opened(self, seed: int) -> dict[str, Any]:
        config = json.loads(json.dumps(vars(MixingConfig(excluded_token_ids="special")))) | self.config
        return {
            "format": FORMAT, "version": "0", "config": config | {"seed": seed}, "enable_prefix_caching": False,
            "model": SHAPE,
        }  # fmt: skip

    def complete(self, prompt: list[int], body: dict) -> Iterator[dict]:
        """Completions that no two answers share."""
        for index in range(body["n"]):
            with self.lock:
                self.answers += 1
                answer = self.answers
            row = body["vllm_xargs"]["ngrpo_ops"] + index
            tokens = [prompt[0], row, answer]
            self.tokens[row] = tokens
            names = [f"token_id:{token}" for token in tokens]
            logprobs = {"tokens": names, "token_logprobs": [-1.0] * 3, "top_logprobs": [{}] * 3}
            yield {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs}


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.setdefault(self.path, []).append(body)
        self.reply(body)

    def reply(self, body: dict) -> None:
        status, content = self.server.answer(self.path, body)
        name = body.get("method", self.path)
        with self.server.lock:
            if lost := name in self.server.lose:
                self.server.lose.remove(name)
        if lost:
            self.close_connection = True
            self.connection.close()
            return
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def record_of(tokens: dict[int, list[int]], rows: list[int]) -> MixRecord:
    """A record that says whose it is: the first candidate of each step is the token."""
    ids = torch.tensor([tokens[row] for row in rows], dtype=torch.int64).reshape(len(rows), -1 if rows else 0)
    candidates = ids[..., None].repeat(1, 1, 3)
    return MixRecord(
        torch.ones_like(ids).bool(), candidates, torch.ones(candidates.shape) / 3, 0, torch.zeros(ids.shape)
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def server(engine: Engine) -> Callable[..., adapter.MixingServer]:
    """A `MixingServer`, attached to TRL's own client unless `attach` says otherwise."""

    def make(attach: bool = True, retries: int = 3, **settings: Any) -> adapter.MixingServer:
        defaults = {"vllm_server_base_url": engine.url, "vllm_server_timeout": 0.1, "mixing_rate": 0.1}
        args = NGRPOConfig("out", use_cpu=True, bf16=False, report_to="none", **defaults | settings)
        made = adapter.MixingServer(args, args.mixing(), "some/model")
        if attach:
            made.attach(trainer_of(engine, retries))
        return made

    return make


def trainer_of(engine: Engine, retries: int = 3, **shape: Any) -> Any:
    client = VLLMClient.__new__(VLLMClient)  # without vLLM it cannot be made, and is asked for nothing of vLLM's
    client.session, client.base_url, client.model = requests.Session(), engine.url, "some/model"
    again = Retry(total=retries, read=retries, allowed_methods=["POST"], backoff_factor=0)
    client.session.mount("http://", HTTPAdapter(max_retries=again))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**SHAPE | shape))
    return SimpleNamespace(model=SimpleNamespace(config=config), vllm_generation=SimpleNamespace(vllm_client=client))


def rollout(server: adapter.MixingServer, first: int = 8, prompts: int = 3, n: int = 2, **more: Any) -> tuple[Any, Any]:
    """What the client returned and the record, of a rollout by one process."""
    with server.rollouts(torch.arange(first, first + prompts * n)) as records:
        output = server.client.generate(prompts=[[30 + i] for i in range(prompts)], n=n, max_tokens=3, **more)
    (record,) = records
    return output, record


# Rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_asks_for_its_rows_and_returns_their_records(server: Any, engine: Engine) -> None:
    made = server()
    output, record = rollout(made, first=8, generation_kwargs={"seed": 5})
    assert [ids[:2] for ids in output["completion_ids"]] == [[30, 8], [30, 9], [31, 10], [31, 11], [32, 12], [32, 13]]
    assert output["prompt_ids"] == [[30], [31], [32]] and len(output["logprobs"]) == 6
    assert record.ids[..., 0].tolist() == output["completion_ids"]
    bodies = sorted(engine.asked["/v1/completions"], key=lambda body: body["prompt"])
    assert [body["vllm_xargs"] for body in bodies] == [{"ngrpo_ops": row} for row in (8, 10, 12)]
    assert all(body["seed"] == 5 and body["max_tokens"] == 3 and body["n"] == 2 for body in bodies)
    takes = [body["args"] for body in engine.asked["/collective_rpc"] if body["method"] == TAKE]
    assert all(args[:3] == [made.run, 8, 14] for args in takes)  # what a server may forget
    assert "generate" not in vars(made.client)  # the client is TRL's again


def test_a_lost_reply_is_asked_for_again(server: Any, engine: Engine) -> None:
    made = server()
    engine.lose += [TAKE, TAKE, "/v1/completions"]
    output, record = rollout(made)
    assert len(engine.asked["/v1/completions"]) == 4  # one again, whose tokens are others
    assert record.ids[..., 0].tolist() == output["completion_ids"]


def test_more_prompts_than_connections(server: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_CONCURRENCY", 2)
    output, record = rollout(server(), prompts=7, n=1)
    assert record.ids[..., 0].tolist() == output["completion_ids"] and len(output["completion_ids"]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda engine: setattr(engine, "run", None), "knows no trainer"),
        (lambda engine: setattr(engine, "run", "another"), "another trainer"),
    ],
)
def test_another_server_stops_the_next_rollout_before_it_begins(
    server: Any, engine: Engine, change: Any, message: str
) -> None:
    made = server()
    rollout(made)
    change(engine)
    before = len(engine.asked["/v1/completions"])
    with pytest.raises(RuntimeError, match=message):
        rollout(made, first=14)
    assert len(engine.asked["/v1/completions"]) == before


def test_a_server_that_is_started_anew_in_a_rollout_stops_it(server: Any, engine: Engine) -> None:
    made = server()
    complete = engine.complete

    def anew(*arguments: Any) -> Any:
        engine.run = None
        return complete(*arguments)

    engine.complete = anew  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"knows no trainer.*resume from the last checkpoint"):
        rollout(made)


def test_a_server_that_is_gone_stops_the_rollout(server: Any, engine: Engine) -> None:
    made = server(retries=1)
    engine.shutdown()
    engine.server_close()
    with pytest.raises(RuntimeError, match=r"failed in a rollout.*resume from the last checkpoint"):
        rollout(made)


def test_a_refused_request_is_raised_with_its_text(server: Any, engine: Engine) -> None:
    made = server()
    engine.replies["/v1/completions"] = 400, {"error": "no row id"}
    with pytest.raises(RuntimeError, match=r"400.*no row id"):
        rollout(made, prompts=40, n=1)
    assert "generate" not in vars(made.client)


def test_an_error_does_not_wait_for_other_prompts(server: Any, engine: Engine) -> None:
    made, held = server(), threading.Event()
    complete = engine.complete

    def some(prompt: list[int], body: dict) -> Any:
        if prompt == [30]:
            held.wait(20)
            return complete(prompt, body)
        return [{}]  # no choice of vLLM's

    engine.complete = some  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="failed in a rollout"):
        rollout(made)
    assert time.monotonic() - began < 10
    held.set()


def test_a_record_of_other_tokens_is_never_taken(server: Any, engine: Engine) -> None:
    made = server()
    complete = engine.complete

    def others(prompt: list[int], body: dict) -> Any:
        choices = list(complete(prompt, body))
        engine.tokens[body["vllm_xargs"]["ngrpo_ops"]] = [0, 0, 0]  # as of a request that came between
        return choices

    engine.complete = others  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"row 8: the server has a record of other tokens"):
        rollout(made, prompts=1)


def test_another_number_of_completions_is_noticed(server: Any) -> None:
    made = server()
    with pytest.raises(RuntimeError, match="3 x 2 completions, expected 4"), made.rollouts(torch.arange(4)):
        made.client.generate(prompts=[[1], [2], [3]], n=2)


def test_a_rollout_past_the_client_leaves_no_record(server: Any) -> None:
    with server().rollouts(torch.arange(4)) as records:
        pass
    assert records == []  # which the trainer raises for


# Several processes ------------------------------------------------------------------------------------------------


def test_what_the_main_process_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list] = []

    def broadcast(outcome: list, from_process: int) -> None:
        if told:
            outcome[:] = told.pop()
        else:
            told.append(list(outcome))

    monkeypatch.setattr(adapter, "broadcast_object_list", broadcast)
    assert adapter.told_to_all(True, lambda: 3) == 3
    assert adapter.told_to_all(False, lambda: 4) == 3
    for error in (ValueError("refused"), ConnectionError("gone"), RuntimeError("failed"), KeyError("odd")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            adapter.told_to_all(True, fail)
        expected = type(error) if not isinstance(error, KeyError) else RuntimeError
        with pytest.raises(expected, match=str(error)):
            adapter.told_to_all(False, fail)


def test_each_process_gets_its_rows(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes the first asks for the rows of both, and each has the record of its own."""
    made = server()
    made._processes = 2
    told: list[Any] = []
    monkeypatch.setattr(adapter, "broadcast_object_list", lambda outcome, **_: told.append(list(outcome)))
    with made.rollouts(torch.arange(0, 4)) as records:
        output = made.client.generate(prompts=[[1], [2]], n=4)
    assert records[0].ids[..., 0].tolist() == output["completion_ids"][:4]
    monkeypatch.setattr(
        adapter, "broadcast_object_list", lambda outcome, **_: outcome.__setitem__(slice(2), told.pop(0))
    )
    made._is_main, made._rank = False, 1
    with made.rollouts(torch.arange(4, 8)) as records:
        pass
    assert records[0].ids[..., 0].tolist() == output["completion_ids"][4:]
    assert not told


# Refused ----------------------------------------------------------------------------------------------------------


def test_no_server_is_said_within_the_timeout(server: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_INTERVAL", 0.01)
    with pytest.raises(ConnectionError, match=r"127.0.0.1:1 within vllm_server_timeout=0.1.*VLLM_SERVER_DEV_MODE=1"):
        server(vllm_server_base_url="http://127.0.0.1:1")
    engine.replies["/health"] = 503, {}  # a proxy in front of a server that starts
    with pytest.raises(ConnectionError, match="answers with 503"):
        server()
    threading.Timer(0.2, engine.replies.clear).start()
    server(vllm_server_timeout=20.0)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, {}), "no development endpoints"),
        ((500, {"error": "no method"}), "no method open_mix_records .*no method.*VLLM_PLUGINS"),
        (
            (200, {"results": [error_reply(ValueError("it was not started to mix"))]}),
            "does not mix .it was not started",
        ),
        ((200, {"results": [{"format": FORMAT + 1}]}), f"in form {FORMAT + 1}"),
        ((200, {"results": ["b'as a server without JSON says it'"]}), "does not mix"),
        ((200, {"something": "else"}), "does not mix"),
    ],
)
def test_servers_that_do_not_mix_are_refused_with_the_command(
    server: Any, engine: Engine, reply: tuple, message: str
) -> None:
    engine.replies["/collective_rpc"] = reply
    with pytest.raises(ValueError, match=message) as raised:
        server()
    command = str(raised.value)
    assert (
        "vllm serve some/model" in command and '--additional-config \'{"ngrpo_ops": {"mixing_rate": 0.1}}\'' in command
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"mixing_rate": 0.2}, {}, r"mixing_rate=0.2, not 0.1"),
        ({"strategy": "named_by_a_server:drawn"}, {}, "strategy='named_by_a_server:drawn', not 'neighbor'"),
        ({}, {"mixing_stop_token_ids": [5]}, r"stop_token_ids=\[\], not \[5\].*\"stop_token_ids\": \[5\]"),
        ({}, {"mixing_strategy": "anchor"}, '"k": 1'),
    ],
)
def test_another_mixing_is_refused(server: Any, engine: Engine, theirs: dict, ours: dict, message: str) -> None:
    engine.config = theirs
    with pytest.raises(ValueError, match=message):
        server(**ours)


def test_what_is_the_trainers_own_may_differ(server: Any, engine: Engine) -> None:
    engine.config = {"loss_on_mixed_steps": True}
    made = server(mixing_seed=2**62 + 1, loss_on_mixed_steps=False, mixing_stop_token_ids=None)
    (opened,) = engine.asked["/collective_rpc"]
    assert opened == {"method": OPEN, "args": [made.run, 2**62 + 1]}
    assert server().run != made.run


def test_prefix_caching_and_another_model_are_refused(server: Any, engine: Engine) -> None:
    opened = engine.opened
    engine.opened = lambda seed: opened(seed) | {"enable_prefix_caching": True}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="prefix caching on"):
        server()
    engine.opened = opened  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"another model.*hidden_size=8, not 16"):
        server(attach=False).attach(trainer_of(engine, hidden_size=16))


def test_one_flag_is_enough_for_the_trainers_defaults() -> None:
    config = NGRPOConfig("out", use_cpu=True, bf16=False, report_to="none", seed=7).mixing()
    assert adapter.server_command(config, "m").endswith('\'{"ngrpo_ops": {"mixing_rate": 0.1}}\'')


@pytest.mark.parametrize(
    "name", ["echo", "stream", "prompt", "use_beam_search", "request_id", "truncate_prompt_tokens"]
)
def test_requests_of_another_form_are_refused(name: str) -> None:
    settings = {"use_vllm": True, "vllm_mode": "server", "generation_kwargs": {name: 1}}
    args = NGRPOConfig("out", use_cpu=True, bf16=False, report_to="none", **settings)
    with pytest.raises(ValueError, match=f"generation_kwargs {{'{name}': 1}} is not supported"):
        refuse_settings(args, {"model": SimpleNamespace()})
    args.generation_kwargs = {"vllm_xargs": {"ngrpo_ops": 3}}
    with pytest.raises(ValueError, match="vllm_xargs"):
        refuse_settings(args, {"model": SimpleNamespace()})
    args.generation_kwargs = {"vllm_xargs": {}, "stop": ["x"], name: None}
    refuse_settings(args, {"model": SimpleNamespace()})


def test_a_client_of_another_trl_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMClient, "generate", lambda self, requests: None)
    with pytest.raises(ImportError, match=r"VLLMClient\.generate"):
        server()


def test_with_lora_a_copy_is_sent(engine: Engine, server: Any) -> None:
    """As TRL does it: the weights change in place when its generator ends, and vLLM packs them after that."""
    trainer = trainer_of(engine)
    sent: list[torch.Tensor] = []

    def update_named_params(metadata: list, named_params: Any) -> None:
        sent.extend([tensor for _, tensor in named_params])

    trainer.vllm_generation.vllm_client.update_named_params = update_named_params
    trainer.model.merge_adapter = None
    server(attach=False).attach(trainer)
    weight = torch.ones(2)

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", weight
        weight.zero_()

    trainer.vllm_generation.vllm_client.update_named_params([], merged())
    assert sent[0].tolist() == [1, 1]


# Replies ----------------------------------------------------------------------------------------------------------


def test_a_row_is_found_in_whichever_replica_sampled_it() -> None:
    """Row 1 was asked for twice: one replica has it in part, one with other tokens, one as it was answered."""
    tokens = {0: [5, 6], 1: [7, 8]}
    other = pack_reply(record_of({1: [7, 9]}, [1]), [1], [[7, 9]], {})
    shorter = pack_reply(record_of(tokens, []), [], [], {1: 1})
    right = pack_reply(record_of(tokens, [1]), [1], [[7, 8]], {})
    first = pack_reply(record_of(tokens, [0]), [0], [[5, 6]], {})
    for replies in ([other, None, right, shorter, first], [first, shorter, right, other]):
        assert read_replies(replies, [0, 1], [[5, 6], [7, 8]]).ids[..., 0].tolist() == [[5, 6], [7, 8]]
    for replies, message in (
        ([first, shorter], "a record of 1 steps alone"),
        ([first, other], "other tokens"),
        ([first], "no record"),
    ):
        with pytest.raises(RuntimeError, match=f"row 1: the server has {message}.*2 steps|row 1: .*{message}"):
            read_replies(replies, [0, 1], [[5, 6], [7, 8]])


def test_rows_of_different_lengths_are_padded() -> None:
    long = pack_reply(record_of({0: [5, 6, 7]}, [0]), [0], [[5, 6, 7]], {})
    short = pack_reply(record_of({1: [8]}, [1]), [1], [[8]], {})
    record = read_replies([short, long], [0, 1], [[5, 6, 7], [8]])
    assert record.ids[..., 0].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert record.gate.tolist() == [[True] * 3, [True, False, False]]


def test_a_record_is_smaller_than_the_answers_own_json() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = 4, 256
    gate = torch.rand(shape, generator=generator) < 0.1
    record = MixRecord(
        gate, torch.randint(0, 150_000, (*shape, 3), generator=generator) * gate[..., None],
        torch.rand(*shape, 3, generator=generator) * gate[..., None], 0, -torch.rand(shape, generator=generator),
    )  # fmt: skip
    reply = pack_reply(record, range(4), [[0]] * 4, {})
    assert len(json.dumps(reply)) < 15 * record.gate.numel()
    found = read_replies([reply], range(4), [[0]] * 4)
    assert torch.equal(found.gate, gate[:, :1])


@pytest.mark.parametrize(
    "reply", [{}, {"record": "%"}, {"record": "eJw=", "rows": [], "checksums": [], "shorter": []}, {"rows": 3}]
)
def test_replies_of_something_else_are_refused(reply: dict) -> None:
    with pytest.raises(ValueError, match="replies must be"):
        read_replies([reply], [0], [[1]])


def test_errors_come_out_of_replies() -> None:
    raise_errors([None])
    with pytest.raises(ValueError, match="odd"):
        raise_errors([None, error_reply(ValueError("odd"))])
    with pytest.raises(RuntimeError, match="odd"):
        read_replies([error_reply(KeyError("odd"))], [0], [[1]])
    with pytest.raises(ValueError, match="reads 1"):
        read_opened([{"format": 1}, {"format": 0}])


def test_the_example_of_the_docstring() -> None:
    found = doctest.testmod(adapter)
    assert found.attempted > 0 and not found.failed
