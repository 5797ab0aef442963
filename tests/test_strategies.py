"""Strategies of a user: registered or imported by name, run by the operations, checked, and imported by nobody else."""

from __future__ import annotations

import functools
import pickle
import sys
import warnings

import pytest
import torch
from decode_steps import plain, settings_of

from ngrpo_ops import MixingConfig, decode_step, mixing_candidates, raise_faults, register_strategy, strategies
from ngrpo_ops.ops.decode_step import api
from ngrpo_ops.strategies import Option
from ngrpo_ops.testing import STRATEGIES

SOURCE = """
import torch

calls = []

def pair(policy):
    calls.append(len(policy.logits))
    ids = policy.likeliest(2)
    return ids, torch.full(ids.shape, 0.5, device=ids.device)

def everything(policy):
    ids = torch.cat([policy.draws(1), policy.likeliest(policy.k - 1)], dim=1)
    assert policy.entropy.shape == (len(ids),) and policy.logits.shape[1] == policy.vocabulary
    assert policy.noise("normal", 3).shape == (len(ids), 3)
    return ids, policy.softmax(ids, policy.relative_logits(ids) + policy.noise("gumbel", policy.k))

def none(): ...
def two(policy, more): ...
number = 3
class Rule:
    @staticmethod
    def inside(policy):
        return pair(policy)
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A module of a user's own, and a registry that forgets it again."""
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    (tmp_path / "rules_of_mine.py").write_text(SOURCE)
    (tmp_path / "broken_rules.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield "rules_of_mine"
    for name in ("rules_of_mine", "broken_rules"):
        sys.modules.pop(name, None)


def step(strategy: str, b: int = 4, v: int = 5, **changes):
    return decode_step(**plain(b, v, neighbor_ids=None, **{"strategy": strategy, "k": 2, "mixing_rate": 1.0} | changes))


def test_the_seven_are_entries_of_the_registry():
    assert set(STRATEGIES) <= set(strategies.strategy_names())
    assert all(strategies.get_strategy(name).has_kernel for name in STRATEGIES)
    noisy = [name for name in STRATEGIES if strategies.get_strategy(name).adds_noise]
    assert noisy == ["gaussian"]


def test_a_strategy_is_imported_because_a_configuration_names_it(rules):
    name = f"{rules}:pair"
    with pytest.raises(ValueError, match="after a MixingConfig has named it, got 'rules_of_mine:pair'"):
        step(name)
    assert rules not in sys.modules
    assert MixingConfig(strategy=name, k=2).strategy == name
    out = step(name)
    logits = plain(4, 5)["logits"]
    assert torch.equal(out.ids, logits.topk(2).indices) and bool((out.weights == 0.5).all())
    assert torch.equal(out.token_ids, logits.argmax(-1)) and out.gate.all() and not out.fault.any()
    table = plain(4, 5)["embedding"]
    torch.testing.assert_close(out.embeddings, table[out.ids].mean(1))
    assert MixingConfig(strategy=f"{rules}:Rule.inside", k=2)
    assert torch.equal(step(f"{rules}:Rule.inside").ids, out.ids)


def test_a_configuration_from_another_process_brings_its_strategy(rules):
    sent = pickle.dumps(MixingConfig(strategy=f"{rules}:pair", k=2))
    del strategies._registry[f"{rules}:pair"]
    config = pickle.loads(sent)
    assert step(config.strategy).gate.all()


def test_a_strategy_sees_the_rows_that_are_asked_for(rules):
    MixingConfig(strategy=f"{rules}:pair", k=2)
    calls = sys.modules[rules].calls
    calls.clear()
    mixing_candidates(torch.randn(3, 9), strategy=f"{rules}:pair", k=2)
    step(f"{rules}:pair", b=7)
    assert calls == [3, 7]


@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.01}])
def test_what_a_strategy_draws_is_the_sample_of_the_step(rules, filters):
    MixingConfig(strategy=f"{rules}:everything")
    whole = step(f"{rules}:everything", b=64, v=50, k=4, temperature=0.7, **filters)
    unmixed = step(f"{rules}:everything", b=64, v=50, k=4, temperature=0.7, **filters, mixing_rate=0.0)
    assert torch.equal(whole.ids[:, 0], unmixed.token_ids) and torch.equal(whole.token_ids, whole.ids[:, 0])
    torch.testing.assert_close(whole.weights.sum(1), torch.ones(64))
    a = plain(64, 50, temperature=0.7, **filters)
    counter = {name: a[name] for name in ("seed", "step")}
    alone = mixing_candidates(
        a["logits"],
        strategy=f"{rules}:everything",
        k=4,
        temperature=0.7,
        **filters,
        **counter,
        row_ids=a.get("row_ids"),
    )
    assert torch.equal(alone.ids, whole.ids) and torch.equal(alone.weights, whole.weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rules_of_mine:missing", "'rules_of_mine:missing' cannot be imported: AttributeError"),
        ("no_rules_anywhere:f", "'no_rules_anywhere:f' cannot be imported: ModuleNotFoundError"),
        ("broken_rules:f", "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("rules_of_mine:none", "'rules_of_mine:none' must be a function of one argument"),
        ("rules_of_mine:two", "'rules_of_mine:two' must be a function of one argument"),
        ("rules_of_mine:number", "'rules_of_mine:number' must be a function of one argument"),
        ("rules_of_mine", "or 'package.module:function', got 'rules_of_mine'"),
        (":f", "or 'package.module:function', got ':f'"),
        (None, "or 'package.module:function', got None"),
        (["topk"], "or 'package.module:function', got \\['topk'\\]"),
    ],
)
def test_what_is_no_strategy_is_refused_by_name(rules, name, message):
    with pytest.raises(ValueError, match=f"strategy.*{message}"):
        MixingConfig(strategy=name)


BAD = {
    "one tensor": (lambda p: p.likeliest(2), TypeError, "got Tensor"),
    "a list": (lambda p: [p.likeliest(2), None], TypeError, "got list"),
    "int32 ids": (lambda p: (p.likeliest(2).int(), p.softmax(p.likeliest(2))), TypeError, "got torch.int32"),
    "whole weights": (lambda p: (p.likeliest(2), p.likeliest(2)), TypeError, "and torch.int64"),
    "three ids": (lambda p: (p.likeliest(3), p.softmax(p.likeliest(3))), ValueError, r"got \(4, 3\) and \(4, 3\)"),
    "one row": (lambda p: (p.likeliest(2)[:1], p.softmax(p.likeliest(2))), ValueError, r"got \(1, 2\) and \(4, 2\)"),
    "another device": (lambda p: (p.likeliest(2).to("meta"), p.softmax(p.likeliest(2))), ValueError, "on meta"),
    "no table": (lambda p: (p.neighbors(), None), ValueError, "reads_neighbors=True"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_a_strategy_must_return(monkeypatch, bad):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    function, error, message = BAD[bad]
    register_strategy("a bad one")(function)
    with pytest.raises(error, match=message) as raised:
        step("a bad one")
    assert bad == "no table" or "strategy 'a bad one' must return" in str(raised.value)


WRONG = {
    "outside": (lambda ids, w: (ids + 3, w), "ids outside the vocabulary"),
    "negative id": (lambda ids, w: (ids - 9, w), "ids outside the vocabulary"),
    "negative weight": (lambda ids, w: (ids, torch.tensor([[1.5, -0.5]]).expand(w.shape)), "weights that are negative"),
    "sum": (lambda ids, w: (ids, w * 1.01), "do not sum to 1"),
    "NaN": (lambda ids, w: (ids, w * torch.nan), "not finite"),
    "inf": (lambda ids, w: (ids, w * torch.inf), "not finite"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_of_a_strategy_are_faults_of_their_rows(monkeypatch, wrong):
    """On the device, without a wait; the other rows go on."""
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    change, message = WRONG[wrong]

    def rule(policy):
        ids = policy.likeliest(2)
        weights = policy.softmax(ids)
        bad_ids, bad_weights = change(ids, weights)
        row = torch.arange(len(ids))[:, None] == 2
        return torch.where(row, bad_ids, ids), torch.where(row, bad_weights, weights)

    register_strategy("wrong in row 2")(rule)
    out = step("wrong in row 2", mixing_rate=1.0)
    assert (out.fault != 0).tolist() == [False, False, True, False] == (~out.gate).tolist()
    assert out.token_ids[2] == 0 and out.weights[2].isnan().all() and out.embeddings[2].isnan().all()
    with pytest.raises(RuntimeError, match=f"row 2: its strategy returned.*{message}"):
        raise_faults(out.fault)
    assert not out.weights[[0, 1, 3]].isnan().any()


def test_rows_without_a_distribution_are_no_fault_of_the_strategy(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    register_strategy("pair")(lambda policy: (policy.likeliest(2), policy.softmax(policy.likeliest(2))))
    logits = torch.randn(4, 5)
    logits[0], logits[1, 2], logits[2, 1] = -torch.inf, torch.nan, torch.inf
    out = step("pair", logits=logits)
    assert out.fault.tolist() == [2, 1, 1, 0]


def test_options_and_noise_of_a_strategy_of_ones_own(monkeypatch):
    """A declared noise_scale gives noise on the mix, as "gaussian" has it."""
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    seen = []

    @register_strategy("noisy", options={"noise_scale": Option(0.1, "size of the noise"), "moi_beta": Option(2.0, "b")})
    def noisy(policy):
        seen.append(dict(policy.options))
        ids = policy.likeliest(policy.k)
        return ids, policy.softmax(ids)

    ours = step("noisy", noise_scale=0.33)
    assert torch.equal(ours.embeddings, step("gaussian", noise_scale=0.33).embeddings)
    assert seen == [{"noise_scale": 0.33, "moi_beta": 2.0}]
    assert MixingConfig(strategy="noisy", moi_beta=0.5).options == {"noise_scale": None, "moi_beta": 0.5}
    with pytest.raises(ValueError, match="noise_scale must be finite and at least 0"):
        step("noisy", noise_scale=-1.0)


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    with pytest.raises(ValueError, match="'topk' is registered already"):
        register_strategy("topk")(lambda policy: None)
    register_strategy()(step)
    assert strategies.get_strategy(f"{__name__}:step").function is step
    with pytest.raises(ValueError, match=r"name must be given for .*<lambda>"):
        register_strategy()(lambda policy: None)
    with pytest.raises(TypeError, match=r"must be a function of the policy, got functools\.partial"):
        register_strategy("partly")(functools.partial(step, "pair"))
    with pytest.raises(ValueError, match=r"options must be among \['moi_beta', 'noise_scale'\].*got 'heat'"):
        register_strategy("hot", options={"heat": Option(1.0, "how hot")})
    with pytest.raises(ValueError, match="default must be finite and at least 1"):
        Option(0.5, "too small", least=1)


def decorated(function):
    return functools.wraps(function)(lambda policy: function(policy))


@decorated
@register_strategy(fixed_k=2, emits_sample=True)
def two_of_them(policy):
    ids = policy.draws(2)
    return ids, policy.softmax(ids)


def test_a_decorator_over_a_registered_strategy_keeps_what_it_declares(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    found = strategies.load_strategy(f"{__name__}:two_of_them")
    assert found.function is two_of_them and found.fixed_k == 2 and found.emits_sample


def test_a_fixed_k_holds_with_neighbors_and_without(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    register_strategy("near", reads_neighbors=True, fixed_k=2)(lambda policy: (policy.neighbors(), None))
    register_strategy("nine", fixed_k=9)(lambda policy: (policy.likeliest(9), None))
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="neighbor_ids must have 1 columns for strategy 'near', got 3"):
        mixing_candidates(logits, torch.zeros(5, 3, dtype=torch.int64), strategy="near")
    with pytest.raises(ValueError, match=r"k must be within \[1, V = 5\], got 9"):
        mixing_candidates(logits, strategy="nine")


def test_a_strategy_without_a_kernel_runs_eagerly_and_says_so(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    register_strategy("pair")(lambda policy: (policy.likeliest(2), policy.softmax(policy.likeliest(2))))
    with pytest.raises(ValueError, match="backend='triton' cannot be used here: strategy 'pair' has no kernel"):
        step("pair", backend="triton")
    api._say_no_kernel.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        api._say_no_kernel("pair")
        api._say_no_kernel("pair")
    assert ["strategy 'pair' has no kernel" in str(warning.message) for warning in caught] == [True]


@pytest.mark.slow
def test_a_strategy_of_ones_own_in_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    register_strategy("pair")(lambda policy: (policy.likeliest(2), policy.softmax(policy.likeliest(2))))
    a = plain(4, 5)
    settings = settings_of(k=2, strategy="pair", mixing_rate=0.5)
    torch.library.opcheck(torch.ops.ngrpo.decode_step.default, (a["logits"], a["embedding"], *settings, "eager"))
    torch._dynamo.reset()

    def call(logits, table):
        return decode_step(logits, table, strategy="pair", k=2, seed=1, step=2, mixing_rate=0.5)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, y in zip(compiled(a["logits"], a["embedding"]), call(a["logits"], a["embedding"]), strict=True):
        assert torch.equal(x, y)


def test_the_random_numbers_of_a_strategy_are_independent(monkeypatch):
    """Draws, both kinds of noise and the noise on the mix come from words of their own."""
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    seen = []  # by blocks of rows, as a CPU takes them

    @register_strategy("greedy for numbers", options={"noise_scale": Option(1.0, "size")})
    def rule(policy):
        noises = policy.noise("gumbel", 1), policy.noise("normal", 1)
        seen.append(torch.cat([policy.draws(2)[:, 1:].double(), *noises], dim=1))
        policy.draws(2)[:] = 0  # its own copy: the sample stays
        ids = policy.likeliest(1)
        return ids, torch.ones(ids.shape)

    n = 20_000
    logits, table = torch.zeros(n, 1000), torch.ones(1000, 1)
    settings = {"strategy": "greedy for numbers", "k": 1, "seed": 5, "step": 3}
    mixed = decode_step(logits, table, mixing_rate=1.0, **settings)
    numbers = torch.cat([torch.cat(seen), mixed.embeddings], dim=1).T
    assert (torch.corrcoef(numbers) - torch.eye(4)).abs().max() < 0.035
    unmixed = decode_step(logits, table, mixing_rate=0.0, **settings)
    assert unmixed.token_ids.unique().numel() > 900


@pytest.mark.parametrize("k", [3, 6, 7])
def test_weights_of_lower_precision_sum_to_one(monkeypatch, k):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    register_strategy("even")(lambda policy: (policy.likeliest(policy.k), torch.full((4, k), 1 / k).bfloat16()))
    assert not step("even", v=9, k=k).fault.any()


def test_what_a_registration_promises_is_held_to(monkeypatch):
    monkeypatch.setattr(strategies, "_registry", dict(strategies._registry))
    with pytest.raises(TypeError, match="with parentheses"):
        register_strategy(step)
    with pytest.raises(TypeError, match="has_kernel cannot be given"):
        register_strategy("fast", has_kernel=True)
    register_strategy("no filters", reads_filters=False)(lambda policy: (policy.draws(2), None))
    with pytest.raises(ValueError, match="reads_filters=True"):
        step("no filters")
