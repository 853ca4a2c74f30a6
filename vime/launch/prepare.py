"""Writes what a run needs before it is queued or started: code, plan, and its entry in the registry."""

from __future__ import annotations

import os
from pathlib import Path

from vime.errors import BadInput
from vime.run import code as snapshot
from vime.run.environment import resolve
from vime.run.folder import PLAN, make_run_folder, read_plan, write_plan
from vime.run.plan import Plan
from vime.run.registry import record_run


def claim_folder(plan: Plan) -> None:
    """Make a private run folder, or reuse that of an earlier submission, which this one resumes.

    Raises BadInput for a folder of another user, or of a run with another recipe or model.
    """
    make_run_folder(plan.run_dir)
    if not (Path(plan.run_dir) / PLAN).exists():
        return
    before = read_plan(plan.run_dir)
    if (before.recipe.name, before.model_config_hf) != (plan.recipe.name, plan.model_config_hf):
        raise BadInput(
            f"run folder {plan.run_dir} holds a run of the recipe {before.recipe.name} or another model: "
            "give another folder with --run-dir"
        )


def write_code(plan: Plan) -> None:
    """Write the code snapshot that the plan names."""
    if plan.code is not None and (found := snapshot.look(plan.recipe)) is not None:
        snapshot.write(found, plan.code)


def start(plan: Plan, *, listed: bool = True) -> None:
    """Write code and plan and register the run, so that vime.status and its siblings find it; unless not `listed`."""
    # Report a reference to a missing secret before anything is queued.
    resolve({**plan.cluster.env, **plan.recipe.misc.env}, os.environ)
    claim_folder(plan)
    write_code(plan)
    write_plan(plan)
    try:
        if listed:
            record_run(plan.run_dir)
    except BadInput as error:
        # The home folder is read-only or full: commands then need the run's folder.
        print(f"note: the run is not in the list of runs, so give its folder to vime.status: {error}")
    print(f"run {plan.run_name}: {plan.run_dir}")
    for note in plan.notes:
        print(f"note: {note}")
