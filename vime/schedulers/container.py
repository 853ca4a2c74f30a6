"""Stages in a container: pyxis (options of srun) or apptainer (a program before Python). The controller stays outside.

Makes text only: words of the srun call, mounts, variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vime.errors import BadInput
from vime.run.canary import CANARY
from vime.run.folder import BINDING_VARIABLE
from vime.run.plan import Container, Plan, Stage
from vime.run.variables import JOB, PLACES

NODE_TMP = "/tmp"
OWN_VARIABLES = ("PYTHONPATH", "PYTHONSAFEPATH", PLACES, JOB, CANARY, BINDING_VARIABLE)
"""Variables that vime passes to a task; an image must not replace them."""


def mounts(plan: Plan, container: Container) -> tuple[str, ...]:
    """Mounts of a stage: run folder, base folder, node-local files (shared by the services), and the profile's.

    Raises BadInput for a path that the syntax of mounts cannot express.
    """
    own = [plan.run_dir, *([plan.base_dir] if plan.base_dir else []), plan.cluster.env.get("VIME_NODE_TMP", NODE_TMP)]
    for path in own:
        if "," in path or ":" in path:
            raise BadInput(f"{path} cannot be mounted in a container: it has a comma or a colon, give another folder")
    return tuple(dict.fromkeys([*(f"{path}:{path}" for path in own), *container.mounts]))


def srun_options(plan: Plan) -> list[str]:
    """Options that pyxis adds to srun; empty without pyxis."""
    container = plan.cluster.container
    if container is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts(plan, container))}",
        "--no-container-mount-home",
        # Without this, pyxis prefers the image's value of a variable.
        f"--container-env={','.join(sorted({*plan.cluster.env, *OWN_VARIABLES}))}",
        *container.options,
    ]


def environment(plan: Plan, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that apptainer sets inside, overriding the image's; empty for pyxis.

    Values stay off the command line, where everybody could read them.
    """
    container = plan.cluster.container
    if container is None or container.runtime != "apptainer":
        return {}
    inside = {name: environ[name] for name in (*OWN_VARIABLES, *plan.cluster.env) if name in environ}
    # Packages of `pip install --user` would shadow the image's.
    inside["PYTHONNOUSERSITE"] = "1"
    return {f"APPTAINERENV_{name}": value for name, value in inside.items()}


def wrap(plan: Plan, stage: Stage, command: Sequence[str]) -> list[str]:
    """Command of a task, inside apptainer if the profile asks for it. `command`: interpreter and arguments."""
    container = plan.cluster.container
    if container is None or container.runtime != "apptainer":
        return list(command)
    return [
        "apptainer",
        "exec",
        *(["--nv"] if stage.gpus_per_node else []),
        "--no-home",
        f"--bind={','.join(mounts(plan, container))}",
        *container.options,
        container.image,
        *command,
    ]
