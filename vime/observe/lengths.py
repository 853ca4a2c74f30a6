"""Lengths and rewards of all samples that were trained on, and a histogram of lengths by reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.observe.markup import escape, table
from vime.samples import Rollout
from vime.system.json_lines import LineFile, Lines

LENGTHS_FILE = "lengths.jsonl"
ROLLOUTS = 20
"""First and newest rollouts that the report compares."""
BINS = 24
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 170, 44, 24

Scored = tuple[int, float]
"""Tokens of a response, and its reward."""


@dataclass(frozen=True)
class Lengths:
    """Samples of the first and of the newest rollouts of a run."""

    first: Sequence[Scored]
    newest: Sequence[Scored]
    first_ids: tuple[int, int]
    """First and last of the rollouts that `first` covers."""
    newest_ids: tuple[int, int]


def append_lengths(run_dir: str | Path, rollout: Rollout) -> None:
    """Append one line for the rollout: tokens and rewards of its samples, in the same order."""
    scored = [(len(s.response_ids), round(s.reward, 6)) for s in rollout.samples if s.reward is not None]
    line = {
        "rollout_id": rollout.rollout_id,
        "tokens": [tokens for tokens, _ in scored],
        "rewards": [reward for _, reward in scored],
    }
    file = LineFile(Path(run_dir) / LENGTHS_FILE)
    try:
        file.add(line)
    finally:
        file.close()


def read_lengths(run_dir: str | Path, count: int = ROLLOUTS, damage: Counter[str] | None = None) -> Lengths | None:
    """Samples of the first and newest `count` rollouts; None without records. Repeated rollouts count once.

    Lines that are no record are left out, and counted in `damage` under the file's name.
    """
    lines = Lines(Path(run_dir) / LENGTHS_FILE)
    by_id: dict[int, list[Scored]] = {}
    for number, scored in lines.read(_record):
        by_id[number] = scored
    if damage is not None:
        damage[LENGTHS_FILE] += lines.skipped
    ids = sorted(by_id)
    if not ids:
        return None
    first, newest = ids[:count], ids[-count:]
    ends = (first[0], first[-1]), (newest[0], newest[-1])
    return Lengths([s for n in first for s in by_id[n]], [s for n in newest for s in by_id[n]], *ends)


def _record(line: dict[str, Any]) -> tuple[int, list[Scored]]:
    """Rollout and samples of a line. Raises KeyError, TypeError or ValueError for one that is no record."""
    pairs = zip(line["tokens"], line["rewards"], strict=True)
    return int(line["rollout_id"]), [(int(tokens), float(reward)) for tokens, reward in pairs]


def reward_classes(rewards: Sequence[float]) -> list[tuple[str, Callable[[float], bool]]]:
    """Up to four classes of rewards, lowest first: the distinct values, or thirds of their range if there are more."""
    values = sorted(set(rewards))
    if len(values) <= 4:
        return [(f"reward {value:g}", lambda reward, value=value: reward == value) for value in values]
    low, high = values[0], values[-1]
    a, b = low + (high - low) / 3, low + 2 * (high - low) / 3
    return [
        (f"reward below {a:.3g}", lambda reward: reward < a),
        (f"{a:.3g} to {b:.3g}", lambda reward: a <= reward < b),
        (f"from {b:.3g}", lambda reward: reward >= b),
    ]


def histogram(
    scored: Sequence[Scored], longest: int, classes: int | None = None, *, bins: int = BINS
) -> list[list[int]]:
    """Counts per class of reward (`reward_classes`) and per bin of length; bins divide 0..longest evenly."""
    kinds = reward_classes([reward for _, reward in scored])[:classes]
    counts = [[0] * bins for _ in kinds]
    for tokens, reward in scored:
        kind = next(number for number, (_, holds) in enumerate(kinds) if holds(reward))
        counts[kind][min(bins - 1, tokens * bins // max(longest, 1))] += 1
    return counts


def figures(lengths: Lengths | None) -> str:
    """Histograms of the first and of the newest rollouts at the same scale; empty without samples."""
    if lengths is None or not lengths.newest:
        return ""
    longest = max(tokens for tokens, _ in (*lengths.first, *lengths.newest)) + 1
    shown = [("Newest", lengths.newest, lengths.newest_ids)]
    if lengths.first_ids != lengths.newest_ids:
        shown.insert(0, ("First", lengths.first, lengths.first_ids))
    parts = [_figure(f"{name} rollouts, {a} to {b}", scored, longest) for name, scored, (a, b) in shown if scored]
    return f'<div class="two">{"".join(parts)}</div>'


def _figure(title: str, scored: Sequence[Scored], longest: int) -> str:
    kinds = reward_classes([reward for _, reward in scored])
    counts = histogram(scored, longest)
    highest = max(map(sum, zip(*counts, strict=True)))
    wide = (WIDTH - LEFT) / BINS
    bars = []
    for place in range(BINS):
        bottom = float(HEIGHT - BOTTOM)
        for number, row in enumerate(counts):
            if not row[place]:
                continue
            tall = row[place] / highest * (HEIGHT - BOTTOM - 14)
            bottom -= tall
            span = f"{place * longest // BINS} to {(place + 1) * longest // BINS} tokens"
            bars.append(
                f'<rect class="h{number}" x="{LEFT + place * wide:.1f}" y="{bottom:.1f}" width="{wide - 1:.1f}" '
                f'height="{tall:.1f}"><title>{span}: {row[place]} samples, {escape(kinds[number][0])}</title></rect>'
            )
    rows = [
        {
            "reward": kinds[number][0].removeprefix("reward "),
            "samples": sum(row),
            "mean tokens": round(_mean(scored, kinds[number][1])),
        }
        for number, row in enumerate(counts)
    ]
    said = "; ".join(
        f"{kinds[n][0]}: {row['samples']} samples of {row['mean tokens']} tokens" for n, row in enumerate(rows)
    )
    marks = ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    axis = "".join(
        f'<text x="{LEFT + at * (WIDTH - LEFT):.0f}" y="{HEIGHT - 8}" text-anchor="{anchor}">'
        f"{round(at * longest)}</text>"
        for at, anchor in marks
    )
    keys = "".join(f'<span><i class="key h{n}"></i>{escape(name)}</span>' for n, (name, _) in enumerate(kinds))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Response lengths by reward. {escape(title)}. {escape(said)}">{"".join(bars)}{axis}'
        f'<text x="{LEFT - 6}" y="18" text-anchor="end">{highest}</text></svg><div class="legend">{keys}</div>'
        f"{table(rows, numbers=('samples', 'mean tokens'), caption=title)}</figure>"
    )


def _mean(scored: Sequence[Scored], holds: Callable[[float], bool]) -> float:
    chosen = [tokens for tokens, reward in scored if holds(reward)]
    return sum(chosen) / len(chosen) if chosen else 0.0
