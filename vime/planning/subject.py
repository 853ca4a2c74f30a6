"""Subject of an evaluation: a checkpoint of a run, one of its HF exports, or any HF folder."""

from __future__ import annotations

import dataclasses
import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.models.folder import check_tokenizer
from vime.planning.evaluation import Subject, evaluation_plan, fewest_nodes, job_cluster
from vime.planning.inputs import check_shards, read_json
from vime.recipe.load import absolute_path
from vime.recipe.schema import Recipe
from vime.run.checkpoints import folder_of, iterations
from vime.run.evaluations import evaluation_folder
from vime.run.plan import Cluster, Evaluation, Plan
from vime.run.scheduler import PATIENCE_S, Wanted, find_scheduler

WEIGHTS = "weights"
"""HF folder in the run folder of an evaluation, made for it alone."""


def export_folder(recipe: Recipe, rollout_id: int) -> str | None:
    """HF folder that `--save-hf` writes after a rollout; None without it."""
    path = recipe.checkpoint.save_hf
    return None if path is None else path.replace("{rollout_id}", str(rollout_id))


def of_run(plan: Plan, rollout_id: int | None, weights: str | None) -> Subject:
    """The weights that a run saved after a rollout (None: after the newest one that it saved).

    They are the HF folder `weights`, else the one of `--save-hf`, else made from the checkpoint. Raises BadInput if
    none of these is there.
    """
    root = Path(plan.recipe.checkpoint.save or "")
    numbers = iterations(root)
    if rollout_id is None:
        if not numbers:
            raise BadInput(f"{root} holds no checkpoint: give --checkpoint and the folder of its weights, --weights")
        rollout_id = numbers[0]
    folder = evaluation_folder(plan.run_dir, rollout_id)
    known = weights or export_folder(plan.recipe, rollout_id)
    if weights is None and not (known and "{rollout_id}" in (plan.recipe.checkpoint.save_hf or "")):
        # Without a number in its path the folder holds the weights of some other rollout.
        known = None
    evaluation = Evaluation(weights=str(folder / WEIGHTS), run_dir=plan.run_dir, rollout_id=rollout_id)
    subject = Subject(evaluation, f"{plan.run_name}-eval-{rollout_id}", str(folder), {}, plan.base_dir)
    if known is not None and (Path(known) / "config.json").is_file():
        hf = read_json(Path(known) / "config.json")
        saved = (Path(known) / "config.json").stat().st_mtime
        made = Path(known) == folder / WEIGHTS
        found = evaluation.model_copy(update={"weights": known, "weights_time": saved, "temporary": made})
        return dataclasses.replace(subject, evaluation=found, hf_config=hf)
    if rollout_id not in numbers:
        there = ", ".join(map(str, numbers[:5])) or "none"
        raise BadInput(f"--checkpoint is {rollout_id}: {root} holds {there}, and no HF folder of it is there")
    checkpoint = folder_of(root, rollout_id)
    found = evaluation.model_copy(update={"weights_time": checkpoint.stat().st_mtime, "temporary": True})
    hf = dict(plan.model_config_hf)
    if not plan.on_gpu:
        hf.pop("quantization_config", None)
    like = plan.recipe.checkpoint.hf_checkpoint
    return dataclasses.replace(subject, evaluation=found, hf_config=hf, export_from=str(checkpoint), export_like=like)


def of_folder(folder: str, recipe: Recipe, *, base_dir: str | None, run_dir: str | None, name: str | None) -> Subject:
    """Any HF folder. The run folder is `run_dir`, or a new one below `$BASE_DIR/runs`. Raises BadInput."""
    path = absolute_path(folder, base_dir)
    hf = read_json(Path(path) / "config.json")
    check_shards(path)
    check_tokenizer(Path(path), trust_remote_code=recipe.checkpoint.trust_remote_code)
    name = name or f"eval-{Path(path).name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if run_dir is None and base_dir is None:
        raise BadInput("$BASE_DIR is not set: give --base-dir, or the folder of the evaluation with --run-dir")
    place = absolute_path(run_dir or os.path.join("$BASE_DIR/runs", name), base_dir)
    evaluation = Evaluation(weights=path, weights_time=(Path(path) / "config.json").stat().st_mtime)
    return Subject(evaluation, Path(place).name if run_dir else name, place, hf, base_dir)


@dataclass(frozen=True)
class Shape:
    """Job settings of a command line; None: the profile's."""

    nodes: int | None = None
    partition: str | None = None
    time_limit_minutes: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def plan_evaluation(recipe: Recipe, cluster: Cluster, subject: Subject, shape: Shape | None = None) -> Plan:
    """Plan of the evaluation, once its scheduler has been asked about the nodes.

    Raises BadInput for nodes that the scheduler does not have, SchedulerError without an answer.
    """
    own = cluster.eval_job.model_copy(update=(shape or Shape()).settings)
    cluster = job_cluster(cluster.model_copy(update={"eval_job": own}))
    gpus = cluster.gpus_per_node if recipe.resources.device == "gpu" else 0
    nodes = own.nodes or fewest_nodes(recipe, gpus or 2**30)
    wanted = Wanted(nodes=nodes, gpus_per_node=gpus, partition=None if cluster.one_machine else own.partition)
    resolved, notes = find_scheduler(cluster.kind).resolve(cluster, wanted, timeout_s=PATIENCE_S)
    plan = evaluation_plan(recipe, resolved, own.nodes, subject)
    return plan.model_copy(update={"notes": tuple(notes)})


def preview(plan: Plan) -> Plan:
    """Plan of the jobs that `--eval-job` of this plan will start, to refuse early what cannot be planned later."""
    hf = {name: value for name, value in plan.model_config_hf.items() if plan.on_gpu or name != "quantization_config"}
    folder = evaluation_folder(plan.run_dir, 0)
    evaluation = Evaluation(weights=str(folder / WEIGHTS), run_dir=plan.run_dir)
    subject = Subject(evaluation, f"{plan.run_name}-eval-0", str(folder), hf, plan.base_dir)
    return evaluation_plan(plan.recipe, job_cluster(plan.cluster), None, subject)
