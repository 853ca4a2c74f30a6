"""Test scheduler: Slurm itself, with a stub in the place of a run's training; everything else of the run is real.

Profiles name it as `kind: tests.support.stub_training:StubTraining`.
"""

from __future__ import annotations

from tests.support import patience
from tests.support.launch_stub import stub
from vime.run.folder import write_plan
from vime.run.plan import Plan
from vime.schedulers.slurm import Slurm

FAILS_FIRST = 2e-6
"""Learning rate of a run whose first start fails."""

TRAINING = f"""
import os, pathlib, time
from vime.run.folder import read_plan
from vime.run.messages import report
from vime.run.metrics import MetricsWriter
run = os.environ["VIME_RUN"]
recipe = read_plan(run).recipe
metrics = MetricsWriter(run)
for step in range(recipe.rollout.num_rollout):
    metrics.write(step, {{"rollout/raw_reward": recipe.optimizer.lr * 1e5 * (step + 1)}})
    time.sleep(1)
mark = pathlib.Path(run, "failed once")
if recipe.optimizer.lr == {FAILS_FIRST} and not mark.exists():
    mark.touch()
    raise SystemExit("the loss is NaN")
report("result")
"""


class StubTraining(Slurm):
    """Slurm, but a run is its preflight and a stub that writes the rewards of its rollouts."""

    def submit(self, plan: Plan) -> int:
        train = stub("train", TRAINING, deadline_s=patience.JOB, tells_end=True)
        plan = plan.model_copy(update={"stages": (plan.stages[0], train)})
        write_plan(plan)
        return super().submit(plan)
