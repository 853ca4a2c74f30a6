"""The end of a run in one word and one line, with advice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vime.errors import Cause
from vime.observe.summary import RunSummary

ADVICE = {
    Cause.CODE_ERROR: "The last lines of the log below name the line of code; a requeue would end the same way.",
    Cause.BAD_INPUT: "Fix what the line names and submit again; nothing was lost.",
    Cause.OUT_OF_MEMORY: "See what a node needs with python -m vime.plan: a smaller --max-tokens-per-gpu, more nodes, "
    "or no reference model (docs/plan.md).",
    Cause.NODE_FAILURE: "A requeued or resubmitted run leaves out broken nodes and resumes from its last checkpoint.",
    Cause.TIME_LIMIT: "The run saved before the limit; the same command resumes it.",
    Cause.PREEMPTED: "Slurm starts the job again; it resumes from its last checkpoint.",
    Cause.CANCELLED: "Somebody cancelled it; the command under Checkpoints resumes it.",
    Cause.PREFLIGHT: "A node failed preflight: the line names it, the finding and the need (--spares).",
    Cause.DEADLINE: "Something did not answer in time; the line says what was missing.",
    Cause.STORAGE: "A disk or the shared file system is full, read-only or gone: make room, then resume.",
    Cause.SPIKE: "It resumes without that rollout's prompts; left-out.json names them.",
    Cause.CRASH: "It resumes by itself while it saves checkpoints; look at the named rank's log if this happens often.",
    Cause.DATA_ERROR: "Data or rewards cannot provide what training needs; the line says why.",
}


@dataclass(frozen=True)
class Outcome:
    """First lines of the report."""

    kind: Literal["good", "bad", "warn"]
    word: str
    text: str
    where: str = ""
    """Stage, node and rank."""
    advice: str = ""
    tail: str = ""
    """Last lines of the log that shows the cause."""


def outcome(run: RunSummary) -> Outcome:
    """The outcome of the run's last start."""
    end = run.end
    if end is None:
        last = run.events[-1] if run.events else None
        text = (
            f"No end is recorded; the last event is {last['kind']}: {last.get('text', '')}" if last else "No event yet."
        )
        return Outcome("warn", "running or cut off", text, advice="python -m vime.status tells which.")
    data = end.get("data", {})
    cause = str(data.get("cause", "SUCCESS"))
    if cause == "SUCCESS":
        return Outcome("good", "succeeded", str(end.get("text", "")))
    places = {name: end.get(name) for name in ("stage", "node", "rank")}
    where = ", ".join(f"{name} {value}" for name, value in places.items() if value is not None)
    known = Cause.__members__.get(cause)
    advice = f"{ADVICE.get(known, '')} See docs/faults.md#{cause.lower().replace('_', '-')}." if known else ""
    again = bool(data.get("requeued"))
    kind = "warn" if again else "bad"
    word = f"{cause.lower().replace('_', ' ')}{', requeued' if again else ''}"
    return Outcome(kind, word, str(end.get("text", "")), where, advice, str(data.get("log_tail") or ""))
