"""`python -m vime.node.post_mortem`: reports the state of a node's GPUs after training failed, as a `result`.

The stage is in no plan: the controller starts it if a GPU fault may have ended training.
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
    """Stage that inspects every node, with the GPUs of the plan's largest stage."""
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
