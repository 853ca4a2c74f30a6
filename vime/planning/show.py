"""The plan as text for people, printed by the dry run and `vime.plan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vime.planning.saving import AUTO, failure_seconds, planned_interval_seconds
from vime.planning.traffic import checkpoint_seconds
from vime.run.plan import EnginePlan, NodePlan, Plan, Stage, TeacherPlan, TrainerRank
from vime.system.redact import redact


def render(plan: Plan) -> str:
    """The whole plan: components, hardware, stages, memory of the nodes, and notes."""
    parts = [_head(plan), _stages(plan), _memory(plan), _placement_summary(plan)]
    if plan.notes:
        parts.append("\n".join(["Notes", *(f"  - {note}" for note in plan.notes)]))
    return redact("\n\n".join(parts) + "\n")


def render_placement(plan: Plan) -> str:
    """One line per GPU: node, GPU, Megatron coordinates, engine and its ranks."""
    rows = [row for node in plan.nodes for row in _placement_rows(plan, node)]
    return table(("node", "gpu", "rank", "tp", "cp", "dp", "pp", "ep", "etp", "edp", "engine", "dp", "tp"), rows) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "  ") -> str:
    """Text table with columns as wide as their longest entry and numbers right-aligned."""
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    numeric = [all(row[i].replace(".", "").replace("-", "").isdigit() for row in body) for i in range(len(head))]
    lines = []
    for row in (list(head), *body):
        cells = (
            f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in zip(row, widths, numeric, strict=True)
        )
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,8` for (0, 1, 2, 3, 8)."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _head(plan: Plan) -> str:
    layout, recipe = plan.layout, plan.recipe
    sizes = " x ".join(
        f"{name}{value}" for name, value in (("TP", layout.tp), ("CP", layout.cp), ("DP", layout.dp), ("PP", layout.pp))
    )
    rollout = recipe.rollout
    ranks = f"{layout.world_size} ranks, {sizes}, experts EP{layout.ep} x ETP{layout.etp} x EDP{layout.edp}"
    training = [
        (
            "rollouts",
            f"{rollout.num_rollout} of {rollout.rollout_batch_size} x {rollout.n_samples_per_prompt} samples, "
            f"{rollout.num_steps_per_rollout} steps of {rollout.global_batch_size}",
        ),
        ("checkpoints", f"{recipe.checkpoint.save}, {_saves(plan)}"),
    ]
    evaluating = [("evaluation", " ".join(recipe.eval.eval_prompt_data))]
    lines = [
        ("run", plan.run_name),
        ("folder", plan.run_dir),
        ("recipe", recipe.name),
        ("model", f"{plan.model_config_hf['architectures'][0]}, {recipe.checkpoint.hf_checkpoint}"),
        ("cluster", _cluster(plan)),
        ("nodes", f"{len(plan.nodes)} of {plan.nodes[0].gpus} GPUs" + (f", {plan.spares} spare" * bool(plan.spares))),
        *([] if plan.evaluation else [("trainer", ranks)]),
        ("engines", _engines(plan)),
        *([("teacher", _teacher(plan.teacher))] if plan.teacher else []),
        *(evaluating if plan.evaluation else training),
    ]
    return "\n".join(["Plan", *(f"  {name:<12}{value}" for name, value in lines)])


def _saves(plan: Plan) -> str:
    interval = plan.recipe.checkpoint.save_interval
    if interval != AUTO:
        return f"every {interval or '-'} rollouts"
    each, between = checkpoint_seconds(plan), failure_seconds(plan)
    return (
        f"every {planned_interval_seconds(plan) / 3600:.1f} h at first: sqrt(2 x {each:.0f} s a save x "
        f"{between / 3600:.0f} h between failures)"
    )


def _cluster(plan: Plan) -> str:
    cluster = plan.cluster
    where = f", partition {cluster.partition}" if cluster.partition else ""
    return f"{cluster.name} ({cluster.kind}{where}), time limit {duration(cluster.time_limit_minutes * 60)}"


def _engines(plan: Plan) -> str:
    first: EnginePlan = plan.engines[0]
    experts = ", expert parallel" if first.expert_parallel else ""
    shared = " (the trainer's)" if plan.recipe.resources.colocate else ""
    return (
        f"{len(plan.engines)} of {sum(map(len, first.gpus))} GPUs on {len(first.nodes)} nodes each{shared}, "
        f"DP{first.data_parallel_size} x TP{first.tensor_parallel_size}{experts}"
    )


def _teacher(teacher: TeacherPlan) -> str:
    first, numbers = teacher.engines[0], ranges([engine.index for engine in teacher.engines])
    weights = f", {size(teacher.weights_bytes)}" if teacher.weights_bytes else ""
    nodes = ranges(sorted({node for engine in teacher.engines for node in engine.nodes}))
    return (
        f"{teacher.path}{weights}; engine {numbers} of {sum(map(len, first.gpus))} GPUs on node {nodes}, "
        f"DP{first.data_parallel_size} x TP{first.tensor_parallel_size}, up to {teacher.max_model_len} tokens"
    )


def _stages(plan: Plan) -> str:
    rows = [(stage.name, _tasks(stage), duration(stage.deadline_s), _traffic(stage)) for stage in plan.stages]
    shown = table(("stage", "tasks", "deadline", "reads -> writes"), rows)
    commands = [f"  {stage.name}: python {' '.join(stage.command)}" for stage in plan.stages]
    return "\n".join(["Stages", shown, "", "Commands", *commands])


def _tasks(stage: Stage) -> str:
    kind = ", service" if stage.service else ""
    return f"node {ranges(stage.nodes)} x {stage.tasks_per_node}{kind}"


def _traffic(stage: Stage) -> str:
    def side(artefacts: Sequence) -> str:
        return ", ".join(f"{each.name}" + (f" {size(each.bytes)}" if each.bytes else "") for each in artefacts)

    return f"{side(stage.inputs)} -> {side(stage.outputs)}" if stage.inputs or stage.outputs else ""


def _memory(plan: Plan) -> str:
    """Totals of the nodes, equal neighbours merged, and the fullest node's items."""
    groups: list[list[NodePlan]] = []
    for node in plan.nodes:
        if groups and groups[-1][0].host_memory == node.host_memory:
            groups[-1].append(node)
        else:
            groups.append([node])
    fullest = max(plan.nodes, key=lambda node: node.host_memory.total_bytes)
    totals = [
        f"  node {ranges([node.index for node in group])}: {size(group[0].host_memory.total_bytes)}" for group in groups
    ]
    items = [(item.name, size(item.bytes), item.why) for item in fullest.host_memory.items]
    title = f"Node {fullest.index}, item by item" if len(groups) > 1 else "Item by item"
    return "\n".join(["Host memory a node", *totals, "", title, table(("item", "size", "why"), items)])


def _placement_summary(plan: Plan) -> str:
    rows = []
    for node in plan.nodes:
        ranks = [plan.trainer_ranks[rank] for rank in node.ranks]
        stages = ranges(sorted({rank.pp for rank in ranks})) if ranks else "-"
        rows.append((node.index, ranges(node.ranks) or "-", stages, ranges(node.engines) or "-"))
    return "\n".join(
        ["Placement (--placement of vime.plan prints every GPU)", table(("node", "ranks", "pp", "engines"), rows)]
    )


def _placement_rows(plan: Plan, node: NodePlan) -> Iterator[tuple[object, ...]]:
    ranks: dict[int, TrainerRank] = {plan.trainer_ranks[rank].gpu: plan.trainer_ranks[rank] for rank in node.ranks}
    serving = {gpu: cell for index in node.engines for gpu, cell in engine_cells(plan.servers[index], node.index)}
    for gpu in range(node.gpus):
        at = ranks.get(gpu)
        trainer = (at.rank, at.tp, at.cp, at.dp, at.pp, at.ep, at.etp, at.edp) if at else ("-",) * 8
        yield (node.index, gpu, *trainer, *serving.get(gpu, ("-",) * 3))


def engine_cells(engine: EnginePlan, node: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Each GPU on a node with its (engine, data-parallel rank, tensor-parallel rank)."""
    position = engine.nodes.index(node)
    before = sum(len(gpus) for gpus in engine.gpus[:position])
    for place, gpu in enumerate(engine.gpus[position], start=before):
        yield gpu, (engine.index, *divmod(place, engine.tensor_parallel_size))
