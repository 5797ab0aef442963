"""`python -m ngrpo_ops rollout`: what is shown of a rollout, in a terminal and as a page, and its errors."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import EOS, byte_tokenizer, tiny_model, tokenizer

from ngrpo_ops import MixingConfig, mix_embeddings
from ngrpo_ops.__main__ import main
from ngrpo_ops.integrations.transformers import NeighborMixing
from ngrpo_ops.integrations.transformers.view import load_checkpoint, pieces, roll_out, token_text
from ngrpo_ops.view import Arm, Candidate, Rollouts, Token, page, print_rollouts, visible

PLAIN = MixingConfig(mixing_rate=0)
PROMPT = "w3 w9 w12"
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\u202e\x00\ud800\"'&"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model(vocab_size=len(byte_tokenizer())).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def shown(**arms: MixingConfig) -> Rollouts:
    settings = {"temperature": 0.8, "max_new_tokens": 12, "samples": 3, "seed": 5}
    return roll_out(tiny_model(), tokenizer(), PROMPT, arms, name="tiny", **settings)


# What is shown ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["neighbor", "gaussian", "multiplex", "anchor"])
def test_what_is_shown_is_what_the_record_says(strategy):
    config = MixingConfig(mixing_rate=0.5, strategy=strategy, seed=2)
    (arm,) = shown(mixed=config).arms
    model, words = tiny_model(), tokenizer()
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(5)
    sequences, record = NeighborMixing(model, config).generate(
        ids, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=12, num_return_sequences=3
    )
    table = model.get_input_embeddings().weight.detach()
    assert bool(record.gate.any())
    for row, sample in enumerate(arm.samples):
        completion = sequences[row, ids.shape[1] :].tolist()
        length = completion.index(EOS) + 1 if EOS in completion else len(completion)
        assert len(sample) == length and "".join(t.text for t in sample) == words.decode(completion[:length])
        for step, token in enumerate(sample):
            assert bool(token.candidates) == bool(record.gate[row, step])
            if not token.candidates:
                continue
            assert [c.token_id for c in token.candidates] == record.ids[row, step].tolist()
            assert [c.weight for c in token.candidates] == record.weights[row, step].tolist()
            assert [c.text for c in token.candidates] == [words.decode([i]) for i in record.ids[row, step].tolist()]
            if strategy != "gaussian":  # whose noise is in the mix too
                mix = mix_embeddings(table, record.ids[row, step][None], record.weights[row, step][None])[0]
                anchor = table[record.ids[row, step, 0]]
                assert token.cosine == pytest.approx(float(torch.cosine_similarity(mix, anchor, dim=0)), abs=1e-5)
    assert (arm.noise is not None) == (strategy == "gaussian")
    assert arm.replay_error < 1e-5
    assert strategy == "anchor" or arm.plain_error > 1e-2


def test_plain_sampling_is_stock_and_mixing_says_the_same_up_to_the_first_mix():
    plain, mixed = shown(plain=PLAIN, mixed=MixingConfig(mixing_rate=0.2)).arms
    model, words = tiny_model(), tokenizer()
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(5)
    stock = model.generate(
        ids, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=12, num_return_sequences=3, pad_token_id=0
    )[:, ids.shape[1] :]
    assert not plain.mixed and plain.plain_error is None and plain.replay_error < 1e-5
    for row, (a, b) in enumerate(zip(plain.samples, mixed.samples, strict=True)):
        assert "".join(t.text for t in a) == words.decode(stock[row, : len(a)])
        first = next((i for i, token in enumerate(b) if token.candidates), len(b))
        assert [t.text for t in a[:first]] == [t.text for t in b[:first]]


def test_the_generators_of_torch_and_the_model_are_left_as_they_were():
    model = tiny_model()
    before = torch.get_rng_state()
    roll_out(model, tokenizer(), PROMPT, {"mixed": MixingConfig()}, name="tiny", max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_character_of_several_tokens_is_with_its_last():
    words = byte_tokenizer()
    ids = words("aé😀b", add_special_tokens=False)["input_ids"]
    assert pieces(words, ids) == ["a", "\ufffd", "é", "\ufffd", "\ufffd", "\ufffd", "😀", "b"]
    long = words("né " * 200, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(words, long)).replace("\ufffd", "") == "né " * 200
    assert token_text(words, ids[1]) == words.convert_ids_to_tokens(ids[1])
    assert token_text(words, 10_000) == "<unused 10000>"


def test_the_weight_of_what_was_mixed_in_counts_the_emitted_token_once():
    draws = (Candidate("a", 4, 0.4), Candidate("b", 5, 0.2), Candidate("a", 4, 0.4))
    assert Token("a", draws).mixed_in == pytest.approx(0.2) and Token("a").mixed_in == 0


# The terminal -------------------------------------------------------------------------------------------------------


def hostile() -> Rollouts:
    mixed = Token(HOSTILE, (Candidate(HOSTILE, 3, 0.75), Candidate("\n", 4, 0.25)), 0.9876)
    arms = (Arm("plain", ((Token(HOSTILE), Token("[red]")),), 1e-6), Arm("<b>", ((Token("x"), mixed),), 2e-6, 0.5, 0.3))
    return Rollouts(HOSTILE, HOSTILE, {"seed": "0"}, arms, (HOSTILE,))


def printed(rollouts: Rollouts, rich: bool, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    with monkeypatch.context() as patched:
        if not rich:
            patched.setitem(sys.modules, "rich", None)
        patched.setenv("COLUMNS", "200")
        stream = io.TextIOWrapper(raw, encoding=encoding)
        print_rollouts(rollouts, stream)
        stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
def test_both_terminals_say_what_was_mixed(rich, monkeypatch):
    rollouts = shown(plain=PLAIN, mixed=MixingConfig(mixing_rate=0.5))
    text = printed(rollouts, rich, monkeypatch)
    assert PROMPT in text and "has no chat template" in text
    for arm in rollouts.arms:
        assert f"{arm.name}: {arm.summary()}" in text and f"{arm.name}, sample 3" in text
    for sample in rollouts.arms[1].samples:
        for token in (token for token in sample if token.candidates):
            row = "  ".join(f"{c.weight:.3f} '{c.text}'" for c in token.candidates)
            assert re.search(rf"\[\d+\]\s+{re.escape(row)}\s+(cosine )?{token.cosine:.4f}", text), row
    assert ("╭" in text) == rich


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_text_of_the_model_does_nothing_to_a_terminal(rich, encoding, monkeypatch):
    text = printed(hostile(), rich, monkeypatch, encoding)
    assert not set(text) & set("\x1b\x00\u202e")
    assert r"\x1b[31m\u202e\x00\ud800" in text and "[red]" in text and r"0.250 '\n'" in text


# The page -----------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """The elements of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.script, self._inside = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.script += data
        elif self._inside != "style":
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_shows_each_mix_to_pointer_and_keyboard():
    rollouts = shown(plain=PLAIN, mixed=MixingConfig(mixing_rate=0.5))
    found = _Page(page(rollouts))
    mixed = [token for arm in rollouts.arms for token in arm.mixed]
    marks, tips = found.named("mark"), [e for e in found.named("span") if e.get("role") == "tooltip"]
    assert len(marks) == len(tips) == len(mixed) > 0
    assert all(mark["tabindex"] == "0" for mark in marks)
    assert [mark["aria-describedby"] for mark in marks] == [tip["id"] for tip in tips]
    assert len({tip["id"] for tip in tips}) == len(tips)
    shades = [float(mark["style"].removeprefix("--mixed:")) for mark in marks]
    by_sample = [t for i in range(3) for arm in rollouts.arms for t in arm.samples[i] if t.candidates]
    assert shades == pytest.approx([token.mixed_in for token in by_sample], abs=1e-4)
    for token in mixed:
        assert all(f"'{c.text}'" in found.text and f"{c.weight:.4f}" in found.text for c in token.candidates)
        assert f"cosine with the anchor {token.cosine:.4f}" in found.text
    assert all(arm.summary() in found.text for arm in rollouts.arms) and PROMPT in found.text
    assert found.text.count("Sample ") == 3


def test_text_of_the_model_is_escaped_and_the_page_loads_nothing():
    html = page(hostile())
    found = _Page(html)
    assert not {"img", "link", "iframe", "object", "b"} & {tag for tag, _ in found.elements}
    names = {name for _, attributes in found.elements for name in attributes}
    assert not {"src", "href", "srcset"} & names and not any(name.startswith("on") for name in names)
    assert "url(" not in html and "@import" not in html and "://" not in html
    assert not set(html) & set("\x1b\x00\u202e\ud800")
    assert found.text.count("</script><img src=x onerror=alert(1)>") == 7  # each place that shows it
    (policy,) = (m["content"] for m in found.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    html.encode()


def test_every_character_that_hides_or_turns_is_written_out():
    assert visible("a\nb é 😀 \u200d \t") == "a\nb é 😀 \u200d \\t"
    assert visible("\x7f\x85\u2028\u2066\ufeff\ue000") == r"\x7f\x85\u2028\u2066\ufeff\ue000"


# The command --------------------------------------------------------------------------------------------------------


def run(*arguments: object, prompt: str = PROMPT) -> int:
    return main(["rollout", "--prompt", prompt, "--max-new-tokens", "6", "--device", "cpu", *map(str, arguments)])


def test_the_command_prints_and_writes_the_page(folder, tmp_path, capsys):
    html = tmp_path / "rollout.html"
    options = ["--samples", 2, "--rate", 0.5, "--k", 2, "--strategy", "topk", "--temperature", 1, "--seed", 3]
    assert run("--model", folder, *options, "--html", html) == 0
    text = capsys.readouterr().out
    assert "topk, rate 0.5, k = 2, sample 2" in text and "plain sampling, sample 1" in text
    assert f"written to {html}" in text and html.read_text().startswith("<!doctype html>")
    assert str(folder) not in html.read_text() and [p.name for p in tmp_path.iterdir()] == ["rollout.html"]


def test_a_chat_template_is_used_where_there_is_one(folder):
    model, words = load_checkpoint(str(folder))
    assert words.padding_side == "left" and not model.training
    words.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    with_template = roll_out(model, words, "w5", {"plain": PLAIN}, name="x", max_new_tokens=3, seed=1)
    words.chat_template = None
    written_out = roll_out(model, words, "<w5>", {"plain": PLAIN}, name="x", max_new_tokens=3, seed=1)
    assert with_template.arms == written_out.arms and not with_template.notes
    assert written_out.notes == ["The tokenizer has no chat template: the prompt is read as it stands."]


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [("{{ raise_exception('a system message first') }}", "w5", "a system message first"), (None, "\ud800", "")],
    ids=["template", "surrogate"],
)
def test_a_prompt_that_cannot_be_encoded_is_named(folder, template, prompt, reason):
    model, words = load_checkpoint(str(folder))
    words.chat_template = template
    with pytest.raises(ValueError, match=rf"^prompt cannot be encoded by .*: \w+: .*{reason}"):
        roll_out(model, words, prompt, {"plain": PLAIN}, name="x", max_new_tokens=1)


def test_what_the_maker_of_a_checkpoint_notes_is_beside_the_figures(folder):
    model, words = load_checkpoint(str(folder))
    model.config.weights_note = "Dequantized."
    assert roll_out(model, words, "w5", {"plain": PLAIN}, name="x", max_new_tokens=1).notes[0] == "Dequantized."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "2"], r"--rate must be within \[0, 1\], got 2\.0"),
        (["--k", "0"], r"--k must be an integer of at least 1"),
        (["--k", "300"], r"--k must be at most the vocabulary size 258, got 300"),
        (["--strategy", "nothing"], r"--strategy must be one of .*, got 'nothing'"),
        (["--samples", "0"], r"--samples must be at least 1, got 0"),
        (["--max-new-tokens", "0"], r"--max-new-tokens must be at least 1, got 0"),
        (["--temperature", "0"], r"--temperature must be above 0 and finite, got 0\.0"),
        (["--temperature", "nan"], r"--temperature must be above 0 and finite, got nan"),
        (["--seed", str(2**64)], r"--seed must be an integer of 64 bits"),
        (["--html", "/nowhere/at/all.html"], r"--html must be a file in a folder that is there .*got /nowhere"),
        (["--html", "."], r"--html must be a file in a folder that is there"),
        (
            ["--max-new-tokens", "40000"],
            r"--prompt and new tokens must fit the model's context of .*, got 9 and 40,000",
        ),
        (["--prompt", "w3 " * 11000], r"--prompt and new tokens must fit the model's context of 32,768 tokens"),
        (["--prompt", ""], r"--prompt must hold at least one token, got ''"),
        (["--model", "."], r"--model '\.' cannot be loaded: \w+: "),
        (["--model", "/nowhere"], r"--model '/nowhere' cannot be loaded: \w+: "),
        (["--model", "no/such-model"], r"--model 'no/such-model' cannot be loaded: \w+: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run("--model", folder, *arguments)
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(rf"error: {message}", last), last


def test_a_damaged_checkpoint_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit) as exit:
        run("--model", tmp_path)
    assert exit.value.code == 2 and "cannot be loaded" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(folder, tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as exit:
        run("--model", folder, "--html", tmp_path / "x.html")
    assert exit.value.code == 2 and "--html must be" in capsys.readouterr().err


# A browser ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1360, 390], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_candidates_on_hover_and_on_focus(browser, tmp_path, width, scheme):
    rollouts = shown(plain=PLAIN, mixed=MixingConfig(mixing_rate=0.5))
    html = tmp_path / "rollout.html"
    html.write_text(page(rollouts))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    view, requests, errors = context.new_page(), [], []
    view.on("request", lambda request: requests.append(request.url))
    view.on("pageerror", lambda error: errors.append(error))
    view.on("console", lambda message: errors.append(message.text))
    view.goto(html.as_uri())
    assert requests == [html.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    marks = view.locator("mark")
    assert marks.count() == len(rollouts.arms[1].mixed)

    def tips() -> list[str]:
        return [tip.inner_text() for tip in view.locator(".tip").all() if tip.is_visible()]

    def expect(index: int) -> None:
        (text,) = tips()
        token = [t for sample in rollouts.arms[1].samples for t in sample if t.candidates][index]
        assert all(f"'{c.text}'" in text and f"{c.weight:.4f}" in text for c in token.candidates), text

    assert tips() == []
    view.keyboard.press("Tab")
    expect(0)
    view.keyboard.press("Tab")
    expect(1)
    box = view.locator(".tip:visible").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800
    view.keyboard.press("Escape")
    assert tips() == []
    marks.nth(2).hover()
    expect(2)
    dark = view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark") and errors == []
    context.close()


def test_a_browser_runs_nothing_of_the_model(browser, tmp_path):
    html = tmp_path / "rollout.html"
    html.write_text(page(hostile()))
    context = browser.new_context(offline=True)
    view, requests, dialogs = context.new_page(), [], []
    view.on("request", lambda request: requests.append(request.url))
    view.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    view.goto(html.as_uri())
    assert view.locator("img").count() == 0 and view.locator("script").count() == 1
    assert requests == [html.as_uri()] and dialogs == []
    assert "<img src=x onerror=alert(1)>" in view.locator("mark").inner_text()
    context.close()
