"""Which ranks and rollouts are profiled, and where profiles are."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.recipe.schema import ProfileOptions, Recipe
from vime.system.private import private_folder

PROFILES = "profiles"


def profile_folder(run_dir: str | os.PathLike[str]) -> Path:
    """`<run>/profiles`."""
    return Path(run_dir) / PROFILES


def profiles(options: ProfileOptions, rank: int, rollout_id: int) -> bool:
    """True if the training of this rollout is profiled on this rank."""
    return rank in options.profile_ranks and rollout_id in options.profile_rollouts


def check_profile(recipe: Recipe, world_size: int) -> None:
    """Raise BadInput for ranks or rollouts that do not exist."""
    options = recipe.profile
    if bool(options.profile_ranks) != bool(options.profile_rollouts):
        given, other = ("ranks", "rollouts") if options.profile_ranks else ("rollouts", "ranks")
        raise BadInput(f"--profile-{given} needs --profile-{other}: give both")
    for name, numbers, end in (
        ("ranks", options.profile_ranks, world_size),
        ("rollouts", options.profile_rollouts, recipe.rollout.num_rollout),
    ):
        if wrong := [number for number in numbers if not 0 <= number < end]:
            raise BadInput(f"--profile-{name} is {wrong[0]}: the run has {end}, give numbers from 0 to {end - 1}")
    if options.profiler == "nsys" and recipe.resources.device != "gpu":
        raise BadInput("--profiler nsys sees GPUs only, and the run is on processors: give torch")


def check_report_path(recipe: Recipe, run_dir: str) -> None:
    """Raise BadInput for a run folder that keeps nsys from writing its reports, which ends the rank."""
    if recipe.profile.profiler == "nsys" and recipe.profile.profile_ranks and '"' in run_dir:
        raise BadInput(f"--profiler nsys cannot write below {run_dir}: give a --run-dir without double quotes")


def nsys_environment(recipe: Recipe, run_dir: str, rank: int) -> dict[str, Any]:
    """Ray's runtime environment of a rank that runs under Nsight Systems; empty for any other.

    Makes the folder of the reports: nsys does not.
    """
    options = recipe.profile
    if options.profiler != "nsys" or rank not in options.profile_ranks:
        return {}
    report = private_folder(profile_folder(run_dir)) / f"rank-{rank:03d}.%p"
    # Ray joins its own folder with this before a shell reads it: a path whose slash is quoted would be relative.
    output = "/" + shlex.quote(str(report).removeprefix("/"))
    # Only what the worker marks is recorded: the training of the chosen rollouts.
    marked = {"capture-range": "cudaProfilerApi", "capture-range-end": f"repeat:{len(options.profile_rollouts)}"}
    # Samples of the processors take rights that many nodes refuse, and nsys may never end where a kernel lacks events.
    unsampled = {"sample": "none", "cpuctxsw": "none"}
    wanted = {"t": "cuda,nvtx,cublas,osrt", "o": output, "force-overwrite": "true", **unsampled, **marked}
    return {"runtime_env": {"nsight": wanted}}
