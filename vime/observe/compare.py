"""Several runs on one page: outcomes side by side, options that differ, and their curves in the same charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vime.observe import spent, verdict
from vime.observe.charts import Series, line_chart
from vime.observe.document import document
from vime.observe.markup import escape, table
from vime.observe.outcome import outcome
from vime.observe.page import CHARTS
from vime.observe.summary import REWARD, RunSummary
from vime.run.metrics import series

SHOWN_RUNS = 8
"""Most runs whose curves share a chart; the table has all."""


def compare_page(runs: Sequence[RunSummary], title: str) -> str:
    """The whole document."""
    labels = names(runs)
    sections = {
        "Runs": table(
            [_row(label, run) for label, run in zip(labels, runs, strict=True)],
            numbers=("rollouts", "first reward", "last reward", "tokens/s/GPU", "useful time"),
            caption="Every run and how it went",
        ),
        "Options": _options(labels, runs),
        "Curves": _curves(labels, runs),
    }
    more = f" Curves are those of the first {SHOWN_RUNS}." if len(runs) > SHOWN_RUNS else ""
    subtitle = f'<p class="sub">{len(runs)} runs.{escape(more)}</p>'
    return document(title, "", subtitle, sections, "Each run has a report of its own: vime.report RUN.")


def names(runs: Sequence[RunSummary]) -> list[str]:
    """Names of the runs; of runs with the same name, their folders."""
    found = [run.plan.run_name for run in runs]
    return [run.plan.run_dir if found.count(name) > 1 else name for name, run in zip(found, runs, strict=True)]


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Options that are not the same everywhere, dotted, with their value in each; None where an option is missing."""
    flat = [_flat(each) for each in settings]
    keys = sorted({key for each in flat for key in each})
    found = {key: [each.get(key) for each in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _row(label: str, run: RunSummary) -> dict[str, Any]:
    totals = spent.spent(run.spans, run.steps, run.starts)
    first, last, speed = run.mean(REWARD, first=True), run.mean(REWARD), run.mean("perf/tokens_per_gpu_per_s")
    return {
        "run": label,
        "end": outcome(run).word,
        "rollouts": f"{len(run.rewards)} of {run.plan.recipe.rollout.num_rollout}",
        "first reward": "" if first is None else f"{first:.3f}",
        "last reward": "" if last is None else f"{last:.3f}",
        "tokens/s/GPU": "" if speed is None else f"{speed:,.4g}",
        "useful time": f"{100 * (1 - spent.lost_share(totals)):.0f} %" if totals else "",
        "is it learning?": verdict.learning(run.steps).answer,
    }


def _options(labels: Sequence[str], runs: Sequence[RunSummary]) -> str:
    differing = differences([run.plan.recipe.model_dump() for run in runs])
    rows = [
        {"option": option.partition(".")[2].replace("_", "-") or option, **dict(zip(labels, values, strict=True))}
        for option, values in differing.items()
    ]
    return table(rows, caption="Options that differ") or '<p class="panel">No option differs.</p>'


def _curves(labels: Sequence[str], runs: Sequence[RunSummary]) -> str:
    shown = list(zip(labels, runs, strict=True))[:SHOWN_RUNS]
    evaluations = sorted({n for _, run in shown for v in run.steps.values() for n in v if _is_score(n)})
    wanted = [(title, lines[0][0], unit) for title, lines, unit in CHARTS]
    wanted[1:1] = [(name, name, "") for name in evaluations]
    charts = (
        line_chart(title, [Series(label, series(run.steps, metric)) for label, run in shown], unit=unit)
        for title, metric, unit in wanted
    )
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else ""


def _is_score(name: str) -> bool:
    return name.startswith("eval/") and name.count("/") == 1
