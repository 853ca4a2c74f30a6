"""Stages in a container: pyxis (options of srun) or apptainer (a program before Python). The controller stays outside.

Text only: which words stand in the srun call, and what is mounted.
"""

from __future__ import annotations

from collections.abc import Sequence

from vime.errors import BadInput
from vime.run.plan import Container, Plan, Stage

NODE_TMP = "/tmp"


def mounts(plan: Plan, container: Container) -> tuple[str, ...]:
    """What a stage must see: the run's folder and the base folder, node-local files (services meet there), and more.

    Raises BadInput for a path that the syntax of mounts cannot say.
    """
    own = [plan.run_dir, *([plan.base_dir] if plan.base_dir else []), plan.cluster.env.get("VIME_NODE_TMP", NODE_TMP)]
    for path in own:
        if "," in path or ":" in path:
            raise BadInput(f"{path} cannot be mounted in a container: it has a comma or a colon, give another folder")
    return tuple(dict.fromkeys([*(f"{path}:{path}" for path in own), *container.mounts]))


def srun_options(plan: Plan) -> list[str]:
    """Options of srun that pyxis adds; none without it."""
    container = plan.cluster.container
    if container is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts(plan, container))}",
        "--no-container-mount-home",
        *container.options,
    ]


def wrap(plan: Plan, stage: Stage, command: Sequence[str]) -> list[str]:
    """The command of a task, in apptainer where the profile says so. `command` is what stands after Python."""
    container = plan.cluster.container
    if container is None or container.runtime != "apptainer":
        return list(command)
    return [
        "apptainer",
        "exec",
        *(["--nv"] if stage.gpus_per_node else []),
        f"--bind={','.join(mounts(plan, container))}",
        *container.options,
        container.image,
        *command,
    ]
