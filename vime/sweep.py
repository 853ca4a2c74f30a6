"""`python -m vime.sweep FILE`: plan and submit the variants of a run, show how they go, and compare them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vime.cli import build_parser, command
from vime.errors import BadInput
from vime.launch.prepare import start
from vime.observe.pages import write_comparison
from vime.planning.request import check_fits, plan_from
from vime.planning.show import table
from vime.planning.sweep import Sweep, Variant, load_sweep
from vime.run.folder import PLAN
from vime.run.jobs import read_jobs
from vime.run.plan import Plan
from vime.run.scheduler import find_scheduler
from vime.run.state import RunState, run_state
from vime.system.text import visible

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


def members(sweep: Sweep, folder: Path) -> list[Member]:
    """The variants with their states, in order."""
    found = []
    for variant in sweep.variants:
        place = folder / variant.name
        state = run_state(place) if (place / PLAN).exists() else None
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
            find_scheduler(plan.cluster.kind).check(plan)
    except BadInput as error:
        raise BadInput(f"variant {member.variant.name} ({member.variant.label()}): {error}") from error
    return plan.model_copy(update={"command": (*words, "--", *flags)})


def submit(sweep: Sweep, chosen: Sequence[Member], plans: Sequence[Plan], everyone: Sequence[Member]) -> int:
    """Submit runs so that at most `at_once` are active; the exit code of the first that failed here."""
    active = [job for member in everyone if (job := _active_job(member))]
    code = 0
    for member, plan in zip(chosen, plans, strict=True):
        scheduler = find_scheduler(plan.cluster.kind)
        if sweep.at_once is not None and len(active) >= sweep.at_once:
            plan = scheduler.after(plan, active[-sweep.at_once])
        start(plan)
        code = scheduler.submit(plan) or code
        active += [job.job_id for job in read_jobs(member.folder)][-1:]
    return code


def render(found: Sequence[Member]) -> str:
    """One line per variant."""
    rows = []
    for member in found:
        state = member.state
        rows.append(
            (
                member.variant.name,
                visible(member.variant.label()),
                state.state if state else "-",
                (state and state.job) or "-",
                "-" if state is None or state.rollout is None else f"{state.rollout}/{state.num_rollout}",
                "-" if state is None or state.reward is None else f"{state.reward:.3g}",
            )
        )
    return table(("variant", "options", "state", "job", "rollouts", "reward"), rows, indent="")


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    args = build_parser("vime.submit", "").parse_args(words)
    if args.flags:
        raise BadInput(f"submit: unexpected {args.flags[0]!r}: flags of the recipe stand under flags")
    return args


def _active_job(member: Member) -> str | None:
    return member.state.job if member.state and member.state.state in ACTIVE else None


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
    found = members(sweep, folder)
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
    code = submit(sweep, chosen, plans, found)
    print(render(members(sweep, folder)))
    return code


if __name__ == "__main__":
    sys.exit(main())
