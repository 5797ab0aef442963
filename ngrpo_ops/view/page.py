"""Rollouts as one HTML page, which loads nothing. The text of the model is escaped, and no script of it would run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape

from .shown import Arm, Rollouts, Token, quoted, visible

_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #5b6168; --line: #d9dce0;
  --mix: 214 92 0; --most: .62; --focus: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1c1f24; --ink: #e8eaed; --soft: #a3aab3;
  --line: #363b43; --mix: 255 138 46; --most: .58; --focus: #8ab4f8; } }
* { box-sizing: border-box; }
html { scroll-padding-bottom: 14rem; }
body { margin: 0 auto; max-width: 100rem; padding: 1.25rem clamp(.75rem, 3vw, 2.5rem) 9rem; background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
p { margin: .25rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.note { border-left: .25rem solid rgb(var(--mix)); padding-left: .6rem; }
.prompt, .card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.samples { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
.arms { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.samples h2 { margin-top: .5rem; }
mark { color: inherit; background: rgb(var(--mix) / calc(.1 + var(--most) * var(--mixed)));
  border-bottom: 2px solid rgb(var(--mix)); border-radius: .15rem; cursor: help; }
.tip + mark { margin-left: 2px; }
mark:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px; }
.tip { display: none; position: fixed; inset: auto .75rem .75rem; z-index: 1; max-width: 30rem; margin: 0 auto;
  white-space: normal; background: var(--card); color: var(--ink); border: 1px solid var(--soft); border-radius: .5rem;
  box-shadow: 0 .3rem 1.2rem rgb(0 0 0 / .3); padding: .6rem .8rem; font-size: .9rem; }
mark:hover + .tip, mark:focus + .tip, .tip:hover { display: block; }
body:has(mark:hover) mark:focus:not(:hover) + .tip, .dismissed .tip { display: none !important; }
.tip table { border-collapse: collapse; width: 100%; }
.tip td, .tip th, .scroll td, .scroll th { padding: .1rem .6rem .1rem 0; text-align: left; vertical-align: baseline; }
.tip th { color: var(--soft); font-weight: normal; }
.tip td:first-child { overflow-wrap: anywhere; font-family: ui-monospace, monospace; white-space: pre-wrap; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { width: 35%; }
.bar span { display: block; height: .6rem; width: calc(100% * var(--weight)); min-width: 1px;
  background: rgb(var(--mix)); }
.scroll { overflow-x: auto; }
.key span { padding: 0 .35rem; margin-right: .35rem; border-bottom: 2px solid rgb(var(--mix));
  background: rgb(var(--mix) / calc(.1 + var(--most) * var(--mixed))); color: var(--ink); }
"""

# Escape hides the details of a token until another is reached.
_SCRIPT = """
addEventListener("keydown", e => { if (e.key === "Escape") document.body.classList.add("dismissed"); });
for (const kind of ["focusin", "mouseover"])
  addEventListener(kind, e => { if (e.target.tagName === "MARK") document.body.classList.remove("dismissed"); });
"""

_HEAD = "<tr><th>read as a mix of</th><th>id</th><th>weight</th><th></th></tr>"


def page(shown: Rollouts) -> str:
    """The page.

    A mixed token is shaded by the weight of what was mixed in. On hover, and on keyboard focus (Tab), it shows the
    candidates with their weights, and the cosine of the mix. Light and dark as the reader's system is.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    settings = ", ".join(f"{name} {value}" for name, value in shown.settings.items())
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Rollouts of {_text(shown.model)}</title><style>{_STYLE}</style></head><body>",
            f'<header><h1>Rollouts of {_text(shown.model)}</h1><p class="soft">{_text(settings)}</p>',
            *(f'<p class="note">{_text(note)}</p>' for note in shown.notes),
            "</header><main>",
            f'<h2>Prompt</h2><div class="prompt text">{_text(shown.prompt)}</div>',
            *_figures(shown),
            *_key(),
            '<div class="samples">',
            *_samples(shown),
            f"</div></main><script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _text(text: str) -> str:
    return escape(visible(text))


def _figures(shown: Rollouts) -> Iterator[str]:
    yield '<h2>Figures</h2><div class="scroll"><table>'
    for arm in shown.arms:
        yield f'<tr><th scope="row">{_text(arm.name)}</th><td>{_text(arm.summary())}</td></tr>'
    yield "</table></div>"


def _key() -> Iterator[str]:
    shades = "".join(f'<span style="--mixed:{share}">{share:.0%}</span>' for share in (0, 0.05, 0.25, 0.5, 1))
    yield (
        f'<p class="soft key">Mixed tokens, by the weight of what was mixed in: {shades} '
        "Point at one, or reach it with Tab, to see the candidates. Escape hides them.</p>"
    )


def _samples(shown: Rollouts) -> Iterator[str]:
    for index in range(max(len(arm.samples) for arm in shown.arms)):
        yield f'<section><h2>Sample {index + 1}</h2><div class="arms">'
        for number, arm in enumerate(shown.arms):
            tokens = "".join(_token(arm, token, f"t{number}-{index}-{i}") for i, token in enumerate(arm.samples[index]))
            yield f'<article class="card"><h3>{_text(arm.name)}</h3><div class="text">{tokens}</div></article>'
        yield "</div></section>"


def _token(arm: Arm, token: Token, name: str) -> str:
    if not token.candidates:
        return _text(token.text)
    # A line feed alone would have no width to be pointed at.
    text = _text(token.text).replace("\n", "\u21b5\n") or "\u25cc"
    rows = "".join(
        f'<tr><td>{escape(quoted(c.text))}</td><td class="number">{c.token_id}</td>'
        f'<td class="number">{c.weight:.4f}</td>'
        f'<td class="bar"><span style="--weight:{c.weight:.4f}"></span></td></tr>'
        for c in token.candidates
    )
    more = [] if token.cosine is None else [f"cosine with the anchor {token.cosine:.4f}"]
    more += [] if arm.noise is None else [f"noise of {arm.noise:g} added"]
    return (
        f'<mark tabindex="0" aria-describedby="{name}" style="--mixed:{token.mixed_in:.4f}">{text}</mark>'
        f'<span class="tip" role="tooltip" id="{name}"><table>{_HEAD}{rows}</table>{_text("; ".join(more))}</span>'
    )
