"""Writes the HTML pages of runs from their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput
from vime.observe.compare import compare_page
from vime.observe.page import page
from vime.observe.summary import RunSummary, read_run
from vime.observe.timeline import chrome_trace
from vime.run.journal import read_events
from vime.system.files import PRIVATE, write_file
from vime.system.redact import redact


def summary_of(run_dir: Path) -> RunSummary:
    """Everything that pages show of a run."""
    return read_run(run_dir, [event.model_dump() for event in read_events(run_dir)])


def write_report(run_dir: str | Path) -> str:
    """Write `report.html` and `trace.json` (Perfetto) into the run folder; return the run's last line."""
    folder = Path(run_dir)
    run = summary_of(folder)
    write_file(folder / "trace.json", json.dumps(chrome_trace(run.spans)), mode=PRIVATE)
    write_file(folder / "report.html", redact(page(run)), mode=PRIVATE)
    return run.last_line(folder / "report.html")


def write_comparison(run_dirs: Sequence[Path], target: Path, title: str) -> str:
    """Write a page that compares runs; return a line that says where. Raises BadInput where it cannot be written."""
    try:
        write_file(target, redact(compare_page([summary_of(folder) for folder in run_dirs], title)), mode=PRIVATE)
    except OSError as error:
        raise BadInput(f"cannot write {target}: {error.strerror}: give a file that can be written") from error
    return f"{len(run_dirs)} runs compared: {target}"
