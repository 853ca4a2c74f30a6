"""`python -m vime.node.post_mortem`: the state of a node's GPUs after training failed, reported as a `result`.

The stage is in no plan: the controller starts it where a fault of a GPU may have ended training.
"""

from __future__ import annotations

import os
import socket
import sys

from vime.node.gpus import CALL_SECONDS, gpu_facts
from vime.run.devices import VISIBLE
from vime.run.messages import report
from vime.run.plan import Plan, Stage

POST_MORTEM = "post-mortem"


def post_mortem_stage(plan: Plan) -> Stage:
    """One look at every node, with the GPUs that the plan's largest stage asks for."""
    return Stage(
        name=POST_MORTEM,
        nodes=tuple(node.index for node in plan.nodes),
        gpus_per_node=max(stage.gpus_per_node for stage in plan.stages),
        command=("-m", "vime.node.post_mortem"),
        deadline_s=CALL_SECONDS + 30.0,
    )


def main() -> int:
    report("result", host=socket.gethostname(), gpus=gpu_facts(), visible_gpus=os.environ.get(VISIBLE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
