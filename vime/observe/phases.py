"""Charts of time: phases of every rollout, the last rollouts span by span, the wait of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from vime.observe.markup import details, escape, table
from vime.observe.timeline import WAIT, Span, waits

PHASES = ("generate", "reward", "ref_log_probs", "log_probs", "train", "sync", "save", "eval")
NESTED = ("recover", WAIT)
"""Spans nested in a phase: an engine's restart while others generate, a rank's wait in training."""
COLUMNS = 120
"""Bars of the overview; longer runs are averaged."""
SHOWN_ROLLOUTS, SHOWN_RANKS = 4, 16
LEFT, WIDTH = 96, 1160


def by_phase(spans: Sequence[Span]) -> dict[int, dict[str, float]]:
    """Seconds per phase of the driver, by rollout."""
    found: dict[int, dict[str, float]] = {}
    for span in spans:
        if span.track == "driver" and span.rollout_id >= 0 and span.name in PHASES:
            phases = found.setdefault(span.rollout_id, {})
            phases[span.name] = phases.get(span.name, 0.0) + span.seconds
    return dict(sorted(found.items()))


def overview(spans: Sequence[Span]) -> str:
    """One stacked bar per rollout, or per group of rollouts."""
    phases = by_phase(spans)
    if not phases:
        return ""
    size = -(-len(phases) // COLUMNS)
    ids = list(phases)
    groups = [ids[start : start + size] for start in range(0, len(ids), size)]
    means = [{name: sum(phases[i].get(name, 0.0) for i in group) / len(group) for name in PHASES} for group in groups]
    highest = max(sum(each.values()) for each in means) or 1.0
    height, width = 150, (WIDTH - LEFT) / len(groups)
    bars = []
    for number, (group, mean) in enumerate(zip(groups, means, strict=True)):
        bottom, x = float(height), LEFT + number * width
        for name in PHASES:
            if not mean[name]:
                continue
            tall = mean[name] / highest * (height - 10)
            bottom -= tall
            which = f"rollout {group[0]}" if len(group) == 1 else f"rollouts {group[0]} to {group[-1]}"
            bars.append(
                f'<rect class="p-{name}" x="{x:.1f}" y="{bottom:.1f}" width="{max(width - 1, 0.7):.1f}" '
                f'height="{max(tall, 0.3):.1f}"><title>{which}: {name} {mean[name]:.2f} s</title></rect>'
            )
    totals = {name: sum(each.get(name, 0.0) for each in phases.values()) for name in PHASES}
    everything = sum(totals.values()) or 1.0
    shares = [(name, seconds) for name, seconds in totals.items() if seconds]
    said = ", ".join(f"{name} {100 * seconds / everything:.0f} %" for name, seconds in shares)
    marks = "".join(
        f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{_seconds(value)}</text>'
        for y, value in ((18, highest), (height, 0))
    )
    ends = (
        f'<text x="{LEFT}" y="{height + 16}">rollout {ids[0]}</text>'
        f'<text x="{WIDTH}" y="{height + 16}" text-anchor="end">rollout {ids[-1]}</text>'
    )
    rows = [
        {"phase": name, "seconds": f"{seconds:.1f}", "share": f"{100 * seconds / everything:.1f} %",
         "a rollout": f"{seconds / len(phases):.2f} s"}
        for name, seconds in shares
    ]  # fmt: skip
    return (
        f'<figure class="gantt"><svg viewBox="0 0 {WIDTH} {height + 22}" role="img" '
        f'aria-label="Seconds a phase in every rollout: {escape(said)}">{marks}{"".join(bars)}{ends}</svg>'
        f"{legend([name for name, _ in shares])}"
        f"{details('seconds by phase', table(rows, numbers=('seconds', 'share', 'a rollout')))}</figure>"
    )


def last_rollouts(spans: Sequence[Span]) -> str:
    """The newest rollouts span by span: driver, rewards, and some of the ranks."""
    spans = [span for span in spans if span.rollout_id >= 0]
    if not spans:
        return ""
    newest = max(span.rollout_id for span in spans if span.track == "driver") if spans else 0
    spans = [span for span in spans if newest - SHOWN_ROLLOUTS < span.rollout_id <= newest]
    ranks = [track for track in dict.fromkeys(span.track for span in spans) if track.startswith("rank ")]
    if len(ranks) > SHOWN_RANKS:
        step = (len(ranks) - 1) / (SHOWN_RANKS - 1)
        ranks = [ranks[round(i * step)] for i in range(SHOWN_RANKS)]
    others = [track for track in dict.fromkeys(span.track for span in spans) if not track.startswith("rank ")]
    tracks = [*others, *ranks]
    spans = [span for span in spans if span.track in tracks]
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    scale = (WIDTH - LEFT) / max(end - start, 1e-9)
    order = sorted(spans, key=lambda span: span.name in NESTED)
    bars = "".join(_bar(span, LEFT + (span.start - start) * scale, tracks.index(span.track), scale) for span in order)
    labels = "".join(f'<text x="0" y="{17 + 22 * i}">{escape(track)}</text>' for i, track in enumerate(tracks))
    height = 22 * len(tracks) + 24
    names = [name for name in (*PHASES, *NESTED) if any(span.name == name for span in spans)]
    said = (
        f"Phases of rollouts {newest - SHOWN_ROLLOUTS + 1} to {newest} on {len(tracks)} tracks, {_seconds(end - start)}"
    )
    ends = (
        f'<text x="{LEFT}" y="{height - 4}">0 s</text>'
        f'<text x="{WIDTH}" y="{height - 4}" text-anchor="end">{_seconds(end - start)}</text>'
    )
    return (
        f'<figure class="gantt"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(said)}">'
        f"{labels}{bars}{ends}</svg>{legend(names)}</figure>"
    )


def _bar(span: Span, x: float, track: int, scale: float) -> str:
    name = span.name if span.name in (*PHASES, *NESTED) else "other"
    more = " ref" if span.name == "ref_log_probs" else ""
    return (
        f'<rect class="p-{name}{more}" x="{x:.1f}" y="{4 + 22 * track}" width="{max(span.seconds * scale, 0.6):.1f}" '
        f'height="17" rx="1.5"><title>{escape(span.track)}, rollout {span.rollout_id}: {escape(span.name)} '
        f"{span.seconds:.3f} s</title></rect>"
    )


def rank_waits(spans: Sequence[Span]) -> str:
    """Share of its training time that each rank waited for the others before gradients were reduced."""
    shares = waits(spans)
    if len(shares) < 2:
        return ""
    wide, height = max(4, min(28, (WIDTH - LEFT) // len(shares))), 84
    highest = max(max(shares.values()), 0.01)
    bars = "".join(
        f'<rect class="p-train" x="{LEFT + i * wide}" y="{70 - 60 * share / highest:.1f}" width="{wide - 1}" '
        f'height="{max(60 * share / highest, 0.5):.1f}"><title>{escape(track)}: {100 * share:.1f} %</title></rect>'
        for i, (track, share) in enumerate(shares.items())
    )
    least, most = min(shares, key=lambda t: shares[t]), max(shares, key=lambda t: shares[t])
    said = (
        f"{most} waits longest, {100 * shares[most]:.1f} % of its training time; {least} least, "
        f"{100 * shares[least]:.1f} %: the others wait for it"
    )
    rows = [{"rank": track.split()[1], "wait": f"{100 * share:.2f} %"} for track, share in shares.items()]
    marks = "".join(
        f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{text}</text>'
        for y, text in ((16, f"{100 * highest:.0f} %"), (72, "0"))
    )
    return (
        f'<figure class="gantt"><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Wait of each rank: {escape(said)}">{marks}{bars}</svg><p>{escape(said)}.</p>'
        f"{details('wait of every rank', table(rows, numbers=('rank', 'wait')))}</figure>"
    )


def legend(names: Sequence[str]) -> str:
    """Legend of phase colours."""
    keys = "".join(
        f'<span><i class="key p-{escape(name)}{" ref" if name == "ref_log_probs" else ""}"></i>{escape(name)}</span>'
        for name in names
    )
    return f'<div class="legend">{keys}</div>'


def _seconds(value: float) -> str:
    return (
        f"{value / 60:.1f} min" if value >= 180 else f"{value:.1f} s" if value >= 1 or not value else f"{value:.2g} s"
    )
