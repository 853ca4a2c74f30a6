"""Samples that a person may want to read, kept per rollout in `rollouts/<id>.jsonl`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.observe.lengths import append_lengths
from vime.observe.markup import shortened
from vime.samples import Group, Rollout, Sample
from vime.system.files import PRIVATE, draft
from vime.system.json_lines import Lines
from vime.system.private import private_folder

SHOWN_PER_ROLLOUT = 4
_READ = ("index", "group", "response", "label", "reward", "tokens", "status")
WRITTEN_CHARACTERS = 200_000
"""Most characters of a notable sample's prompt and response; 32k tokens have about 120,000."""


def notable(rollout: Rollout) -> list[dict[str, Any]]:
    """The best and the worst samples of a rollout, for a person to read."""
    scored = sorted((s for s in rollout.samples if s.reward is not None), key=lambda s: (s.reward, s.index))
    half = SHOWN_PER_ROLLOUT // 2
    chosen = scored if len(scored) <= SHOWN_PER_ROLLOUT else scored[:half] + scored[-half:]
    return [_shown(sample) for sample in chosen]


def write_samples(run_dir: str | Path, rollout: Rollout, *, everything: bool = False) -> Path:
    """Write a rollout's notable samples, or `everything` of all of them, and the lengths and rewards of all.

    Raises OSError with `everything` alone: no run ends because samples for a person to read could not be written.
    """
    path = Path(run_dir) / "rollouts" / f"{rollout.rollout_id:06d}.jsonl"
    rows = [{**_shown(s), **s.values()} for s in rollout.samples] if everything else notable(rollout)
    try:
        _write_rows(path, rows)
        append_lengths(run_dir, rollout)
    except OSError as error:
        if everything:
            raise
        print(f"warning: samples of rollout {rollout.rollout_id} are not written: {error.strerror}", flush=True)
    return path


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    private_folder(path.parent)
    with (
        draft(path, mode=PRIVATE) as number,
        os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rollout(folder: str | Path, rollout_id: int) -> Rollout:
    """A rollout as `write_samples(…, everything=True)` wrote it. Raises BadInput where it is missing or not whole."""
    path = Path(folder) / f"{rollout_id:06d}.jsonl"
    if not path.is_file():
        raise BadInput(f"there is no {path}: give a folder with this rollout, or fewer rollouts with --num-rollout")
    groups: dict[int, Group] = {}
    for row in _rows(path):
        if "response_ids" not in row:
            raise BadInput(f"{path} has only what a report shows: write rollouts with --save-debug-rollout-data")
        try:
            sample = Sample.from_values(row)
        except KeyError as error:
            raise BadInput(
                f"{path} has no {error.args[0]!r}: an older version wrote it; write the rollouts again"
            ) from error
        groups.setdefault(sample.group_index, Group(sample.group_index, [])).samples.append(sample)
    return Rollout(rollout_id, list(groups.values()))


def read_samples(path: str | Path, most: int | None = None, damage: Counter[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a rollout's file for a person to read: prompts are text. At most `most`: the best and the worst.

    Lines that hold no sample are left out, and counted in `damage` under the file's name.
    """
    rows: list[dict[str, Any]] = []
    lines = Lines(Path(path))
    for row in lines.read(_readable):
        rows.append(row)
        if most is not None and len(rows) > 2 * most:
            rows = _ends(rows, most)
    if damage is not None:
        damage[Path(path).name] += lines.skipped
    return rows if most is None else _ends(rows, most)


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """Values of a row that people read. Raises KeyError, TypeError or ValueError for one that is no sample."""
    reward = None if row["reward"] is None else float(row["reward"])
    shown = {name: row.get(name) for name in _READ}
    turns = [_readable_turn(turn) for turn in row.get("turns") or ()]
    return {**shown, "prompt": prompt_text(row["prompt"]), "reward": reward, "turns": turns}


def _readable_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": str(turn["role"]), "text": str(turn["text"]), "tokens": int(turn["end"]) - int(turn["start"])}


def _ends(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The half with the lowest and the half with the highest rewards, in the order of the file."""
    if len(rows) <= most:
        return rows
    order = sorted((n for n, row in enumerate(rows) if row["reward"] is not None), key=lambda n: rows[n]["reward"])
    kept = {*order[: most // 2], *order[len(order) - (most - most // 2) :]}
    return [row for number, row in enumerate(rows) if number in kept]


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = Lines(path)
    rows = list(lines.read(dict))
    if lines.skipped:
        raise BadInput(f"{path} has {lines.skipped} damaged lines: write the rollouts again")
    return rows


def _shown(sample: Sample) -> dict[str, Any]:
    most = WRITTEN_CHARACTERS // max(1, len(sample.turns))
    turns = sample.turns if len(sample.turns) > 1 else []
    return {
        "index": sample.index,
        "group": sample.group_index,
        "prompt": shortened(prompt_text(sample.prompt), WRITTEN_CHARACTERS),
        "response": shortened(sample.response, WRITTEN_CHARACTERS),
        "label": sample.label,
        "reward": sample.reward,
        "tokens": len(sample.response_ids),
        "status": str(sample.status),
        "turns": [{**asdict(turn), "text": shortened(turn.text, most)} for turn in turns],
        "tools": [asdict(use) for use in sample.tools],
        "branch": sample.branch,
    }


def prompt_text(prompt: Any) -> str:
    """Chat messages as `role: content` lines, text as it is."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
