"""Samples that a person may want to read, kept per rollout in `rollouts/<id>.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.samples import Group, Rollout, Sample, Status

SHOWN_PER_ROLLOUT = 4
SHOWN_CHARACTERS = 4000
_TOKENS = ("prompt_ids", "response_ids", "log_probs", "weight_versions", "loss_mask")


def notable(rollout: Rollout) -> list[dict[str, Any]]:
    """The best and the worst samples of a rollout, shortened to what a report shows."""
    scored = sorted((s for s in rollout.samples if s.reward is not None), key=lambda s: (s.reward, s.index))
    half = SHOWN_PER_ROLLOUT // 2
    chosen = scored if len(scored) <= SHOWN_PER_ROLLOUT else scored[:half] + scored[-half:]
    return [_shown(sample) for sample in chosen]


def write_samples(run_dir: str | Path, rollout: Rollout, *, everything: bool = False) -> Path:
    """Write a rollout's notable samples, or `everything` of all of them; mode 0600, by rename."""
    folder = Path(run_dir) / "rollouts"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{rollout.rollout_id:06d}.jsonl"
    rows = [_whole(s) for s in rollout.samples] if everything else notable(rollout)
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def read_rollout(folder: str | Path, rollout_id: int) -> Rollout:
    """A rollout as `write_samples(…, everything=True)` wrote it. Raises BadInput where it is missing or not whole."""
    path = Path(folder) / f"{rollout_id:06d}.jsonl"
    if not path.is_file():
        raise BadInput(f"there is no {path}: give a folder with this rollout, or fewer rollouts with --num-rollout")
    groups: dict[int, Group] = {}
    for row in read_samples(path):
        if "response_ids" not in row:
            raise BadInput(f"{path} has only what a report shows: write rollouts with --save-debug-rollout-data")
        group = groups.setdefault(row["group"], Group(row["group"], []))
        group.samples.append(
            Sample(
                row["index"],
                row["group"],
                row["prompt"],
                label=row["label"],
                reward=row["reward"],
                response=row["response"],
                status=Status(row["status"]),
                **{name: row[name] for name in _TOKENS},
            )
        )
    return Rollout(rollout_id, list(groups.values()))


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _shown(sample: Sample) -> dict[str, Any]:
    return {
        "index": sample.index,
        "group": sample.group_index,
        "prompt": prompt_text(sample.prompt)[:SHOWN_CHARACTERS],
        "response": sample.response[:SHOWN_CHARACTERS],
        "label": sample.label,
        "reward": sample.reward,
        "tokens": len(sample.response_ids),
        "status": str(sample.status),
    }


def _whole(sample: Sample) -> dict[str, Any]:
    return {
        **_shown(sample),
        "response": sample.response,
        **{name: getattr(sample, name) for name in _TOKENS},
    }


def prompt_text(prompt: Any) -> str:
    """Chat messages as `role: content` lines, text as it is."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
