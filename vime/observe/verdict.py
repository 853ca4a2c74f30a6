"""Three questions about a run, each answered in one line with evidence: is it learning, is it fast, is it healthy?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vime.observe.markup import escape
from vime.observe.spent import LOST, lost_share
from vime.run.metrics import series

Kind = Literal["good", "warn", "bad", "unknown"]
REWARD = "rollout/raw_reward"
FEWEST = 4
"""Rollouts below which a trend means nothing."""
WINDOW = 50
"""Most rollouts at either end that a trend compares."""
SAME_WEIGHTS = 0.1
"""Mean log-prob difference in nats above which trainer and engine hold different weights (docs/rollout.md)."""


@dataclass(frozen=True)
class Verdict:
    """One question, its answer, and what it rests on as (name, value)."""

    question: str
    kind: Kind
    answer: str
    evidence: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Trend:
    """Means of the first and the last `count` values, and their difference in standard errors."""

    first: float
    last: float
    count: int
    errors: float


def trend(values: Sequence[float]) -> Trend | None:
    """Compare the first with the last quarter of a series (at most WINDOW values each). None for fewer than FEWEST."""
    if len(values) < FEWEST:
        return None
    count = min(WINDOW, max(2, len(values) // 4))
    head, tail = values[:count], values[-count:]
    first, last = statistics.fmean(head), statistics.fmean(tail)
    error = math.sqrt((statistics.variance(head) + statistics.variance(tail)) / count)
    difference = last - first
    exact = math.copysign(math.inf, difference) if difference else 0.0
    return Trend(first, last, count, difference / error if error else exact)


def learning(steps: Mapping[int, Mapping[str, float]]) -> Verdict:
    """Whether the mean reward rises beyond its noise."""
    question = "Is it learning?"
    rewards = _values(steps, REWARD)
    found = trend(rewards)
    evidence = [
        *_evaluations(steps),
        *_change(steps, "train/entropy", "entropy"),
        *_change(steps, "train/kl_loss", "KL"),
    ]
    equal = _values(steps, "rollout/zero_std_share")
    if equal:
        evidence.append(("groups of equal rewards", f"{100 * statistics.fmean(equal[-5:]):.0f} %"))
    if found is None:
        return Verdict(question, "unknown", f"Too early to say: {len(rewards)} rollouts.", tuple(evidence))
    moved = f"from {found.first:.3g} (first {found.count} rollouts) to {found.last:.3g} (last {found.count})"
    if found.errors > 2:
        return Verdict(question, "good", f"Yes: the mean reward rose {moved}.", tuple(evidence))
    if found.errors < -2:
        return Verdict(question, "bad", f"No: the mean reward fell {moved}.", tuple(evidence))
    return Verdict(question, "warn", f"Not visibly: the mean reward went {moved}, within its noise.", tuple(evidence))


def speed(steps: Mapping[int, Mapping[str, float]], totals: Mapping[str, float]) -> Verdict:
    """Whether time goes into generating and training, and whether throughput holds. `totals`: `spent.spent`."""
    question = "Is it fast?"
    rate, used = _values(steps, "perf/tokens_per_gpu_per_s"), _values(steps, "perf/mfu")
    if not totals and not rate:
        return Verdict(question, "unknown", "Nothing was measured yet.")
    lost = lost_share(totals)
    worst = max((label for label in totals if label in LOST), key=lambda label: totals[label], default=None)
    evidence = []
    if rate:
        evidence.append(("tokens/s/GPU, last 5 rollouts", f"{statistics.fmean(rate[-5:]):,.4g}"))
    if used:
        evidence.append(("MFU of training", f"{100 * statistics.fmean(used[-5:]):.1f} %"))
    idle = _values(steps, "perf/engine_idle_share")
    if idle:
        evidence.append(("engines idle", f"{100 * statistics.fmean(idle[-5:]):.0f} %"))
    text = f"{100 * (1 - lost):.0f} % of the time went into generating, training and evaluation"
    if worst and totals[worst] > 0.01 * sum(totals.values()):
        text += f"; the largest loss is {worst}, {100 * totals[worst] / sum(totals.values()):.0f} %"
    found = trend(rate)
    if found is not None and found.last < 0.8 * found.first and found.errors < -2:
        slower = f"tokens/s/GPU fell from {found.first:,.4g} to {found.last:,.4g}"
        return Verdict(question, "warn", f"It became slower: {slower}. {text}.", tuple(evidence))
    if not totals:
        return Verdict(question, "unknown", "No timeline was recorded.", tuple(evidence))
    if lost > 0.4:
        return Verdict(question, "warn", f"Time is lost: {text}.", tuple(evidence))
    return Verdict(question, "good", f"Yes: {text}.", tuple(evidence))


def health(steps: Mapping[int, Mapping[str, float]], starts: int, failed: str = "", slow: str = "") -> Verdict:
    """Whether weights agree, engines stay up and answers are whole.

    `failed`: the cause of a failed end, `slow`: a node that holds up the others; or empty.
    """
    question = "Is it healthy?"
    if not steps:
        return Verdict(
            question, "bad" if failed else "unknown", f"No: it ended with {failed}." if failed else "No rollout yet."
        )
    problems, evidence = [], []
    differences = _values(steps, "train/train_rollout_logprob_abs_diff")
    if differences:
        mean = statistics.fmean(differences[-5:])
        evidence.append(("trainer/engine log-prob difference", f"{mean:.3g} nat"))
        if mean > SAME_WEIGHTS:
            problems.append(f"trainer and engines differ by {mean:.2g} nat, above {SAME_WEIGHTS:g}")
    for name, label in (
        ("train/skipped_steps", "skipped optimizer steps"),
        ("sync/engine_restarts", "engine restarts"),
        ("rollout/reward_failures", "failed rewards"),
    ):
        values = _values(steps, name)
        total = sum(values)
        if values:
            evidence.append((label, f"{total:.0f}"))
        if total:
            problems.append(f"{total:.0f} {label}")
    cut = _values(steps, "rollout/truncated_share")
    if cut:
        share = statistics.fmean(cut[-5:])
        evidence.append(("truncated responses", f"{100 * share:.0f} %"))
        if share > 0.3:
            problems.append(f"{100 * share:.0f} % of the responses were cut at the limit")
    if slow:
        problems.append(slow)
    evidence.append(("starts", str(max(1, starts))))
    if failed:
        return Verdict(question, "bad", "; ".join([f"No: it ended with {failed}", *problems]) + ".", tuple(evidence))
    if problems:
        return Verdict(question, "warn", f"Look at this: {'; '.join(problems)}.", tuple(evidence))
    return Verdict(question, "good", "Yes: no skipped step, no engine restart, weights agree.", tuple(evidence))


def panel(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as HTML: a line of words each, with its evidence."""
    parts = []
    for each in verdicts:
        facts = "".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in each.evidence)
        parts.append(
            f'<div class="verdict {each.kind}"><dt>{escape(each.question)}</dt><dd>{escape(each.answer)}'
            f'<div class="evidence">{facts}</div></dd></div>'
        )
    return f'<dl class="panel verdicts">{"".join(parts)}</dl>'


def _values(steps: Mapping[int, Mapping[str, float]], name: str) -> list[float]:
    return [value for _, value in series(steps, name)]


def _evaluations(steps: Mapping[int, Mapping[str, float]]) -> list[tuple[str, str]]:
    """First and last score of up to two evaluation sets."""
    names = sorted({n for values in steps.values() for n in values if n.startswith("eval/") and n.count("/") == 1})
    return [entry for name in names[:2] for entry in _change(steps, name, name)]


def _change(steps: Mapping[int, Mapping[str, float]], name: str, label: str) -> list[tuple[str, str]]:
    values = _values(steps, name)
    return [(label, f"{values[0]:.3g} → {values[-1]:.3g}" if len(values) > 1 else f"{values[0]:.3g}")] if values else []
