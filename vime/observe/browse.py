"""Search in the samples inside the report: an index as JSON, and texts that stay packed, by rollout, until needed."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from vime.observe.markup import escape
from vime.system.redact import redact
from vime.system.text import visible

SCRIPT = files("vime.observe").joinpath("report.js").read_text(encoding="utf-8")
TEXT_BYTES = 64 << 20
"""Most bytes of text, before packing, that a page holds; rollouts beyond that are left out, evenly spaced."""
_START = 160


def policy() -> str:
    """Content security policy of the page: its own style and this script alone; nothing is fetched."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def chosen(sizes: Mapping[int, int], most: int = TEXT_BYTES) -> list[int]:
    """Evenly spaced rollouts, first and newest among them, that fit into `most` bytes. `sizes`: bytes by rollout."""
    ids = sorted(sizes)
    step = 1
    while step < len(ids):
        kept = sorted({*ids[::step], ids[-1]})
        if sum(sizes[number] for number in kept) <= most:
            return kept
        step += 1
    return ids[-1:]


def browser(samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """The searchable list of samples, by rollout; empty without samples. Hidden until its script runs."""
    index: list[dict[str, Any]] = []
    texts: list[str] = []
    for rollout_id, rows in samples.items():
        scored = [row for row in rows if row.get("reward") is not None]
        if not scored:
            continue
        for place, row in enumerate(scored):
            index.append(
                {
                    "rollout": rollout_id,
                    "place": place,
                    "index": row.get("index"),
                    "reward": row["reward"],
                    "tokens": row.get("tokens"),
                    "status": visible(row.get("status")),
                    "label": visible(row.get("label")),
                    "start": visible(row.get("response"))[:_START],
                }
            )
        whole = json.dumps([_texts(row) for row in scored])
        packed = base64.b64encode(gzip.compress(whole.encode(), 5, mtime=0)).decode()
        texts.append(f'<script type="text/plain" id="texts-{rollout_id}">{packed}</script>')
    if not index:
        return ""
    rewards = [row["reward"] for row in index]
    states = "".join(
        f'<option value="{escape(state)}">{escape(state)}</option>'
        for state in sorted({row["status"] for row in index})
    )
    step = 'type="number" step="any"'
    heads = [f'<th scope="col" class="num">{name}</th>' for name in ("rollout", "sample", "reward", "tokens")]
    return (
        '<div id="browse" class="panel" hidden><form role="search">'
        '<label>Text <input name="text" type="search"></label>'
        f'<label>Reward from <input name="low" {step} value="{min(rewards)!r}"></label>'
        f'<label>to <input name="high" {step} value="{max(rewards)!r}"></label>'
        f'<label>Status <select name="status"><option value="">all</option>{states}</select></label>'
        '<output aria-live="polite"></output></form>'
        '<div class="scroll hits" tabindex="0" role="region" aria-label="Samples that match"><table><thead><tr>'
        f'{"".join(heads)}<th scope="col">status</th><th scope="col">response</th>'
        '</tr></thead><tbody></tbody></table></div><article class="view sample" hidden><h4>Sample</h4>'
        '<p class="label">Label: <code></code></p>'
        '<div class="dim">Response</div><ol class="turns"></ol><pre tabindex="0" aria-label="Response"></pre>'
        '<div class="dim">Prompt</div><pre tabindex="0" aria-label="Prompt"></pre></article></div>'
        f"{_data('samples-index', index)}{''.join(texts)}<script>{SCRIPT}</script>"
    )


def _texts(row: Mapping[str, Any]) -> list[Any]:
    """Prompt and response; of a conversation also (role, text) of every turn."""
    texts: list[Any] = [redact(visible(row.get(name))) for name in ("prompt", "response")]
    if turns := row.get("turns"):
        texts.append([[visible(turn["role"]), redact(visible(turn["text"]))] for turn in turns])
    return texts


def _data(name: str, value: Any) -> str:
    """JSON as the content of an inert script element: no `<` and no `>` remains that could end it."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="{name}">{text}</script>'
