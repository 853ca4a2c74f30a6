"""Metrics of conversations: turns, what was given, and the use of tools."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from vime.rollout.session import Counts
from vime.samples import Sample


def conversation_metrics(samples: Sequence[Sample], counts: Counts) -> dict[str, float]:
    """`rollout/turns…`, the share of given tokens, tools by name, and conversations that a limit ended.

    `samples` are the main ones of finished conversations.
    """
    if not samples:
        return {}
    turns = [sum(turn.sampled for turn in sample.turns) for sample in samples]
    given = sum(turn.end - turn.start for sample in samples for turn in sample.turns if not turn.sampled)
    tokens = sum(len(sample.response_ids) for sample in samples)
    metrics = {
        "rollout/turns": statistics.fmean(turns),
        "rollout/turns_max": float(max(turns)),
        "rollout/given_share": given / max(1, tokens),
        "rollout/branches": float(sum(len(sample.branches) for sample in samples)),
        "rollout/template_divergence": counts.divergent / max(1, counts.suffixes),
    }
    metrics |= {f"rollout/out_of_{what}": float(counts.spent.get(what, 0)) for what in ("turns", "tokens", "time")}
    return metrics | _tool_metrics(samples)


def _tool_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    uses = [use for sample in samples for use in sample.tools]
    metrics = {
        "rollout/tool_calls": len(uses) / len(samples),
        "rollout/tool_errors": float(sum(bool(use.error) for use in uses)),
        "perf/tool_time": sum(use.seconds for use in uses) / len(samples),
    }
    for name in sorted({use.name for use in uses}):
        of_tool = [use for use in uses if use.name == name]
        metrics[f"rollout/tool/{name}/calls"] = float(len(of_tool))
        metrics[f"rollout/tool/{name}/seconds"] = statistics.fmean(use.seconds for use in of_tool)
        metrics[f"rollout/tool/{name}/errors"] = float(sum(bool(use.error) for use in of_tool))
        for kind, count in sorted(Counter(use.error for use in of_tool if use.error).items()):
            metrics[f"rollout/tool/{name}/error/{kind}"] = float(count)
    return metrics
