"""`python -m vime.sweep FILE`: plan and submit the variants of a run, show how they go, and compare them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vime.cli import build_parser, command
from vime.errors import BadInput
from vime.launch.prepare import start
from vime.observe.pages import write_comparison
from vime.planning.lanes import turn
from vime.planning.request import check_fits, plan_from
from vime.planning.show import table
from vime.planning.sweep import Sweep, Variant, load_sweep
from vime.run.folder import PLAN, make_run_folder
from vime.run.jobs import read_jobs
from vime.run.plan import Plan
from vime.run.scheduler import find_scheduler
from vime.run.state import RunState, run_state
from vime.system.files import PRIVATE, read_json, write_json
from vime.system.locks import locked
from vime.system.text import visible

RECORD, _LOCK = "sweep.json", ".sweep.lock"
DONE = ("succeeded",)
ACTIVE = ("submitted", "pending", "running", "requeued")
_SET_BY_SWEEP = ("--run-dir", "--runs-dir", "--run-name", "--list-options")


@dataclass
class Member:
    """One variant, its folder, and its state if it was submitted before."""

    variant: Variant
    folder: Path
    state: RunState | None

    @property
    def wanted(self) -> bool:
        """It is neither done nor on its way: what failed is submitted again, and resumes."""
        return self.state is None or self.state.state not in (*DONE, *ACTIVE)


@dataclass
class Record:
    """Content of `sweep.json` in the sweep's folder."""

    options: dict[str, str] = field(default_factory=dict)
    """Options of every variant that was submitted, by its name."""
    lanes: dict[str, int] = field(default_factory=dict)
    """Lane of every job that the sweep has submitted."""

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self), mode=PRIVATE)


def read_record(folder: Path) -> Record:
    """The sweep's record; an empty one before its first submission."""
    content = read_json(folder / RECORD) or {}
    return Record(content.get("options", {}), content.get("lanes", {}))


def members(sweep: Sweep, folder: Path, record: Record) -> list[Member]:
    """The variants with their states, in order. Raises BadInput for one that was submitted with other options."""
    found = []
    for variant in sweep.variants:
        place = folder / f"{sweep.name}-{variant.name}"
        state = run_state(place) if (place / PLAN).exists() else None
        before = record.options.get(variant.name, variant.label())
        if state is not None and before != variant.label():
            raise BadInput(
                f"variant {variant.name} was submitted with {before or 'no options'} and is {variant.label()} now: "
                "add new variants after the old ones, or give the sweep another name"
            )
        found.append(Member(variant, place, state))
    return found


def plan_of(sweep: Sweep, member: Member, *, required: bool) -> Plan:
    """The plan of one variant. Raises BadInput that names the variant."""
    words = [*sweep.submit, "--run-dir", str(member.folder)]
    flags = [*sweep.flags, *member.variant.flags()]
    try:
        plan = plan_from(_arguments(words), flags, required=required, run_folder=required)
        if required:
            check_fits(plan)
            scheduler = find_scheduler(plan.cluster.kind)
            scheduler.check(plan)
            if sweep.at_once is not None and sweep.at_once < len(sweep.variants):
                scheduler.after(plan, ())
    except BadInput as error:
        raise BadInput(f"variant {member.variant.name} ({member.variant.label()}): {error}") from error
    return plan.model_copy(update={"command": (*words, "--", *flags)})


def submit(sweep: Sweep, ready: Sequence[tuple[Member, Plan]], active: list[str], record: Record) -> int:
    """Submit runs so that at most `at_once` are active; the exit code of the first that failed here.

    `active`: the sweep's jobs that are in the queue already. The new ones are added to it.
    """
    code = 0
    for member, plan in ready:
        scheduler = find_scheduler(plan.cluster.kind)
        lane, before = turn(active, record.lanes, sweep.at_once) if sweep.at_once else (None, [])
        if before:
            plan = scheduler.after(plan, before)
        start(plan)
        code = scheduler.submit(plan) or code
        for job in read_jobs(member.folder)[-1:]:
            active.append(job.job_id)
            if lane is not None:
                record.lanes[job.job_id] = lane
                record.write(member.folder.parent)
    return code


def render(found: Sequence[Member]) -> str:
    """One line per variant."""
    rows = []
    for member in found:
        state = member.state
        rows.append(
            (
                member.folder.name,
                visible(member.variant.label()),
                state.state if state else "-",
                (state and state.job) or "-",
                "-" if state is None or state.rollout is None else f"{state.rollout}/{state.num_rollout}",
                "-" if state is None or state.reward is None else f"{state.reward:.3g}",
            )
        )
    return table(("run", "options", "state", "job", "rollouts", "reward"), rows, indent="")


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    args = build_parser("vime.submit", "").parse_args(words)
    if args.flags:
        raise BadInput(f"submit: unexpected {args.flags[0]!r}: flags of the recipe stand under flags")
    return args


def _active_jobs(found: Sequence[Member]) -> list[str]:
    states = [member.state for member in found if member.state is not None]
    return [state.job for state in states if state.job is not None and state.state in ACTIVE]


def _folder(sweep: Sweep) -> Path:
    """The sweep's folder, below the runs' folder. Raises BadInput without a base folder."""
    if taken := [word for word in sweep.submit if word.split("=")[0] in _SET_BY_SWEEP]:
        raise BadInput(f"submit: {taken[0]} is decided by the sweep: leave it out")
    base = _arguments(sweep.submit).base_dir or os.environ.get("BASE_DIR")
    if not base:
        raise BadInput("$BASE_DIR is not set: give --base-dir under submit, or set it in the environment")
    return Path(os.path.abspath(os.path.expanduser(base))) / "runs" / sweep.name


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vime.sweep",
        description="Plan all variants of a run, then submit those that are neither done nor active. The same command "
        "again submits what failed or is missing.",
    )
    parser.add_argument("file", help="YAML file of the sweep (docs/recipes.md)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="plan every variant, print the table and submit nothing")
    what.add_argument("--status", action="store_true", help="print the table of variants and their states")
    what.add_argument("--report", action="store_true", help="write a page that compares the variants")
    args = parser.parse_args(argv)
    sweep = load_sweep(args.file)
    folder = _folder(sweep)
    record = read_record(folder)
    found = members(sweep, folder, record)
    if args.report:
        begun = [member.folder for member in found if member.state is not None]
        if not begun:
            raise BadInput(f"no variant of {sweep.name} was submitted: python -m vime.sweep {args.file} submits them")
        print(write_comparison(begun, folder / "compare.html", sweep.name))
        return 0
    if args.status:
        print(render(found))
        return 0
    chosen = [member for member in found if member.wanted]
    plans = [plan_of(sweep, member, required=not args.dry_run) for member in chosen]
    if args.dry_run:
        print(render(found))
        print(f"{len(chosen)} of {len(found)} would be submitted, below {folder}")
        return 0
    with locked(make_run_folder(folder) / _LOCK, wait=False) as alone:
        if not alone:
            raise BadInput(f"another vime.sweep submits to {folder}: wait for its end")
        # Another call may have submitted some while this one planned.
        record = read_record(folder)
        found = members(sweep, folder, record)
        wanted = {member.folder for member in found if member.wanted}
        ready = [(member, plan) for member, plan in zip(chosen, plans, strict=True) if member.folder in wanted]
        record.options |= {member.variant.name: member.variant.label() for member, _ in ready}
        record.write(folder)
        code = submit(sweep, ready, _active_jobs(found), record)
    print(render(members(sweep, folder, record)))
    return code


if __name__ == "__main__":
    sys.exit(main())
