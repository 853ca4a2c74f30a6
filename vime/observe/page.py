"""The report of a run as one self-contained HTML page. Everything a model or a person wrote is escaped."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from vime.observe import lengths, phases, spent, verdict
from vime.observe.browse import browser
from vime.observe.charts import Series, line_chart
from vime.observe.document import document, time_text
from vime.observe.markup import SHOWN_CHARACTERS, cards, details, escape, facts, pre, shortened, table
from vime.observe.outcome import Outcome, outcome
from vime.observe.stragglers import ROLLOUTS, straggler
from vime.observe.summary import RunSummary
from vime.planning.show import size
from vime.planning.svg import placement_svg
from vime.run.metrics import series
from vime.run.resume import resume_command
from vime.samples import MODEL
from vime.system.json_lines import damage_note

SHOWN_SAMPLES = 8
"""Rollouts whose best and worst samples stand in the page itself, shortened."""

CHARTS = (
    ("Mean reward, all finished groups", (("rollout/raw_reward", "reward"),), ""),
    ("Response length", (("rollout/response_length", "mean"), ("rollout/response_length_max", "longest")), "tokens"),
    (
        "KL and policy change",
        (("train/kl_loss", "KL to the reference"), ("train/ppo_kl", "KL to the old policy")),
        "nat",
    ),
    ("Distance to the teacher", (("train/opd_reverse_kl", "reverse KL"),), "nat"),
    ("Entropy", (("train/entropy", "entropy"),), "nat"),
    ("Generated", (("perf/rollout_tokens_per_s", "generated"),), "tokens/s"),
    ("Throughput", (("perf/tokens_per_gpu_per_s", "throughput"),), "tokens/s/GPU"),
    ("Model FLOPs utilisation of training", (("perf/mfu", "MFU"),), ""),
    ("Policy loss", (("train/pg_loss", "policy loss"),), ""),
    ("Gradient norm", (("train/grad_norm", "norm"),), ""),
    ("Clipped share of tokens", (("train/pg_clipfrac", "share"),), ""),
    ("Trainer/engine log-prob difference", (("train/train_rollout_logprob_abs_diff", "mean difference"),), "nat"),
    ("Tokens that the trainer would send to other experts", (("routing/differs", "share"),), ""),
    ("Groups dropped by the filter", (("rollout/filter_drops", "dropped"),), ""),
    ("Groups of equal rewards", (("rollout/zero_std_share", "share"),), ""),
    ("Truncated responses", (("rollout/truncated_share", "share"),), ""),
    ("Engine prefix cache hits", (("perf/engine_cache_hit_rate", "share"),), ""),
    ("Accepted draft tokens", (("perf/draft_acceptance_rate", "share"),), ""),
    ("Engines idle", (("perf/engine_idle_share", "share"),), ""),
)


def page(run: RunSummary) -> str:
    """The whole document."""
    result = outcome(run)
    totals = spent.spent(run.spans, run.steps, run.starts)
    sections = {
        "Outcome": _outcome(run, result, totals),
        "Curves": _curves(run),
        "Evaluation": _evaluation(run),
        "Timeline": _timeline(run),
        "Placement": _placement(run),
        "Preflight": table(run.preflight, caption="What preflight found on every node"),
        "Samples": _samples(run),
        "Checkpoints": _checkpoints(run),
        "Configuration": _configuration(run),
        "Events": _events(run.events),
    }
    badge = f'<span class="pill {result.kind}">{escape(result.word)}</span>'
    return document(
        run.plan.run_name,
        badge,
        _subtitle(run),
        sections,
        "The same run opens in Perfetto from trace.json and in TensorBoard from the folder tensorboard.",
    )


def _subtitle(run: RunSummary) -> str:
    plan = run.plan
    gpus = sum(node.gpus for node in plan.nodes)
    kind = "GPU" if plan.recipe.resources.device == "gpu" else "CPU slot"
    where = "this machine" if plan.cluster.one_machine else f"cluster {plan.cluster.name}"
    model = os.path.basename((plan.recipe.checkpoint.hf_checkpoint or "").rstrip("/"))
    return (
        f'<p class="sub">{escape(model)} by recipe {escape(plan.recipe.name)} on {len(plan.nodes)} '
        f"node{'s' * (len(plan.nodes) > 1)}, {gpus} {kind}{'s' * (gpus > 1)}, {escape(where)}</p>"
    )


def _outcome(run: RunSummary, result: Outcome, totals: Mapping[str, float]) -> str:
    cause = result.word if result.kind == "bad" else ""
    answers = (
        verdict.learning(run.steps),
        verdict.speed(run.steps, totals),
        verdict.health(run.steps, len(run.starts), cause, _slow_node(run)),
    )
    told = [f"<p><strong>{escape(result.text)}</strong></p>"]
    if result.where:
        told.append(f"<p>{escape(result.where)}</p>")
    if result.advice:
        told.append(f"<p>{escape(result.advice)}</p>")
    if result.tail:
        told.append(pre(shortened(result.tail), "Last lines of the log"))
    ended = f'<div class="panel {result.kind}">{"".join(told)}</div>'
    time_lost = f'<div class="panel"><h3>Wall time by cause</h3>{spent.bar(totals)}</div>' if totals else ""
    first = "" if result.kind == "good" else ended
    return (
        f"{first}{verdict.panel(answers)}{time_lost}{ended if not first else ''}{_numbers(run)}"
        f'<div class="panel">{_facts(run)}</div>'
    )


def _slow_node(run: RunSummary) -> str:
    ranks = run.plan.trainer_ranks
    found = straggler(run.spans, [rank.node for rank in ranks], [rank.pp for rank in ranks])
    if found is None:
        return ""
    host = f" ({run.binding.nodes[found.node].host})" if run.binding else ""
    return (
        f"node {found.node}{host} is slow: {found.ratio:.2f} times the median of its pipeline stage in each of "
        f"the last {ROLLOUTS} rollouts, most of it in {found.phase}"
    )


def _numbers(run: RunSummary) -> str:
    shown = [("rollouts", f"{len(run.rewards)}", f"of {run.plan.recipe.rollout.num_rollout}")]
    for title, name in (
        ("mean reward", "rollout/raw_reward"),
        ("response length", "rollout/response_length"),
        ("log-prob difference", "train/train_rollout_logprob_abs_diff"),
    ):
        first, last = run.mean(name, first=True), run.mean(name)
        if first is not None and last is not None:
            shown.append((title, _number(last), f"{_number(first)} at first"))
    for name in _eval_names(run)[:2]:
        points = series(run.steps, name)
        shown.append((name, f"{points[-1][1]:.3f}", f"{points[0][1]:.3f} at rollout {points[0][0]}"))
    speed, used = run.mean("perf/tokens_per_gpu_per_s"), run.mean("perf/mfu")
    if speed is not None:
        shown.append(("tokens/s/GPU", f"{speed:,.4g}", "over whole rollouts"))
    if used is not None:
        shown.append(("MFU of training", f"{100 * used:.1f} %", "of the bf16 peak"))
    return cards(shown)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _facts(run: RunSummary) -> str:
    plan, layout = run.plan, run.plan.layout
    starts = [event for event in run.events if event["kind"] == "run-start"]
    job = starts[-1]["data"].get("job") if starts else None
    times = [float(event["time"]) for event in run.events]
    engine = plan.engines[0] if plan.engines else None
    hosts = [node.host for node in run.binding.nodes] if run.binding else []
    return facts(
        {
            "job": job,
            "started": time_text(times[0]) if times else None,
            "last event": time_text(times[-1]) if times else None,
            "starts": f"{len(starts)} (resubmitted or requeued)" if len(starts) > 1 else None,
            "run folder": plan.run_dir,
            "checkpoint": plan.recipe.checkpoint.hf_checkpoint,
            "data": ", ".join(plan.recipe.rollout.prompt_data) or None,
            "trainer": f"{layout.world_size} ranks: TP{layout.tp} CP{layout.cp} DP{layout.dp} PP{layout.pp}, "
            f"experts EP{layout.ep} ETP{layout.etp} EDP{layout.edp}",
            "engines": f"{len(plan.engines)}, each DP{engine.data_parallel_size} TP{engine.tensor_parallel_size}"
            if engine
            else None,
            "teacher": plan.teacher.path if plan.teacher else None,
            "nodes": ", ".join(hosts[:32]) + (f" and {len(hosts) - 32} more" if len(hosts) > 32 else ""),
        }
    )


def _curves(run: RunSummary) -> str:
    charts = [
        line_chart(title, [Series(label, series(run.steps, name)) for name, label in lines], unit=unit)
        for title, lines, unit in CHARTS
    ]
    charts.append(line_chart("… by layer", routing_by_layer(run.steps), axis="layer"))
    found = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    histograms = lengths.figures(run.lengths)
    return found + (f"<h3>Response lengths by reward</h3>{histograms}" if histograms else "")


def routing_by_layer(steps: Mapping[int, Mapping[str, float]]) -> list[Series]:
    """Share of tokens with other experts than the engine's over the model's layers, in the first and last rollout."""
    prefix = "routing/differs/layer_"
    found = [
        (step, sorted((float(name.removeprefix(prefix)), share) for name, share in values.items() if prefix in name))
        for step, values in steps.items()
    ]
    told = [(step, points) for step, points in found if points]
    return [Series(f"rollout {step}", points) for step, points in dict([*told[:1], *told[-1:]]).items()]


def _eval_names(run: RunSummary) -> list[str]:
    """The scores of the evaluation sets: `eval/<set>`."""
    names = {name for values in run.steps.values() for name in values if name.startswith("eval/")}
    return sorted(name for name in names if name.count("/") == 1)


def _evaluation(run: RunSummary) -> str:
    charts = []
    for name in _eval_names(run):
        more = sorted({n for values in run.steps.values() for n in values if n.startswith(f"{name}/pass@")})
        lines = [Series("mean", series(run.steps, name))]
        lines += [Series(n.rsplit("/", 1)[1], series(run.steps, n)) for n in more if not n.endswith("pass@1")][:3]
        charts.append(line_chart(name.removeprefix("eval/") + _left_out(run, name), lines))
    missing = "".join(f"<p>{escape(why)}</p>" for why in run.left_out)
    return (f'<div class="charts">{"".join(charts)}</div>' if charts else "") + missing


def _left_out(run: RunSummary, name: str) -> str:
    """Rows of an evaluation set that were too long to be measured, for its title."""
    counts = [values[key] for values in run.steps.values() if (key := f"{name}/prompts_too_long") in values]
    return f" ({counts[-1]:.0f} rows left out as too long)" if counts and counts[-1] else ""


def _timeline(run: RunSummary) -> str:
    parts = {
        "Where the time went": phases.overview(run.spans),
        "The last rollouts": phases.last_rollouts(run.spans),
        "Wait of each rank": phases.rank_waits(run.spans),
    }
    return "".join(f'<h3>{title}</h3><div class="panel">{body}</div>' for title, body in parts.items() if body)


def _placement(run: RunSummary) -> str:
    rows = []
    hosts = {node.index: node.host for node in run.binding.nodes} if run.binding else {}
    for node in run.plan.nodes:
        ranks = [run.plan.trainer_ranks[rank] for rank in node.ranks]
        memory = size(node.host_memory.total_bytes)
        rows.append(
            {
                "node": node.index,
                "host": hosts.get(node.index, ""),
                "ranks": ", ".join(
                    f"{r.rank} (GPU {r.gpu}: tp{r.tp} cp{r.cp} dp{r.dp} pp{r.pp} ep{r.ep})" for r in ranks
                ),
                "engines": ", ".join(map(str, node.engines)),
                "host memory planned": memory,
            }
        )
    picture = placement_svg(run.plan, standalone=False)
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="Placement map">{picture}</div>'
    return f'<div class="panel">{scroll}</div>{details("the same as a table", table(rows))}'


def _samples(run: RunSummary) -> str:
    """Best and worst samples of some rollouts, newest first, and the search in all of them."""
    parts = []
    ids = list(run.samples)
    places = [round(at * (len(ids) - 1) / (SHOWN_SAMPLES - 1)) for at in range(SHOWN_SAMPLES)] if ids else []
    some = {ids[place] for place in places}
    for rollout_id in sorted(some, reverse=True):
        scored = sorted((s for s in run.samples[rollout_id] if s.get("reward") is not None), key=lambda s: s["reward"])
        if not scored:
            continue
        pair = [("best", scored[-1]), ("worst", scored[0])] if len(scored) > 1 else [("only", scored[0])]
        body = f'<div class="two">{"".join(_sample(name, sample) for name, sample in pair)}</div>'
        opened = " open" if not parts else ""
        parts.append(f"<details{opened}><summary>rollout {rollout_id}</summary>{body}</details>")
    return "".join(parts) + browser(run.samples)


def _sample(name: str, sample: dict[str, Any]) -> str:
    label = sample.get("label")
    more = f"{sample.get('tokens')} tokens, {sample.get('status')}"
    return (
        f'<article class="sample {escape(name)}"><h4>{escape(name.capitalize())}: reward {sample["reward"]:.3g}'
        f'<span class="tag">{escape(more)}</span></h4><p class="label">Label: <code>{escape(label)}</code></p>'
        f"{_response(name, sample)}"
        f'<div class="dim">Prompt</div>{pre(shortened(sample.get("prompt"), 2000), f"prompt of the {name} response")}'
        "</article>"
    )


def _response(name: str, sample: dict[str, Any]) -> str:
    """The answer; of a conversation, turn by turn, what the model said and what it was told."""
    turns = sample.get("turns") or []
    if not turns:
        return f'<div class="dim">Response</div>{pre(shortened(sample.get("response")), f"{name} response")}'
    most = max(400, SHOWN_CHARACTERS // len(turns))
    shown = "".join(_turn(turn, most, f"turn {number} of the {name}") for number, turn in enumerate(turns, 1))
    return f'<div class="dim">Conversation</div><ol class="turns">{shown}</ol>'


def _turn(turn: dict[str, Any], most: int, label: str) -> str:
    who = "said" if turn["role"] == MODEL else "told"
    tag = f'<span class="tag">{escape(turn["role"])}, {escape(turn["tokens"])} tokens</span>'
    return f'<li class="{who}">{tag}{pre(shortened(turn["text"], most), label)}</li>'


def _checkpoints(run: RunSummary) -> str:
    rows = [
        {"after rollout": c.rollout_id, "size": size(c.bytes), "written": time_text(c.time), "path": c.path}
        for c in run.checkpoints
    ]
    listed = table(rows, numbers=("after rollout", "size"), caption="Checkpoints on disk when this was written")
    where = "continues after the newest checkpoint" if rows else "starts from the beginning: no checkpoint was written"
    whole = len(run.rewards) >= run.plan.recipe.rollout.num_rollout
    more = (
        " All its rollouts are done: give a larger <code>--num-rollout</code> after <code>--</code>." if whole else ""
    )
    return (
        f'{listed}<div class="panel"><p>This command {where}.{more}</p>'
        f"{pre(shlex.join(resume_command(run.plan)), 'Command that resumes the run')}</div>"
    )


def _configuration(run: RunSummary) -> str:
    plan = run.plan
    recipe = yaml.safe_dump(plan.recipe.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)
    lost = damage_note(run.damage)
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*plan.notes, *([lost] if lost else [])))
    command = shlex.join(("python", "-m", "vime.submit", *plan.command)) if plan.command else ""
    stages = [
        {"stage": stage.name, "nodes": len(stage.nodes), "command": shlex.join(("python", *stage.command))}
        for stage in plan.stages
    ]
    return (
        (f"<h3>Command</h3>{pre(command, 'Command of the run')}" if command else "")
        + (f"<h3>Notes of the plan</h3><ul>{notes}</ul>" if notes else "")
        + f"<h3>Recipe</h3>{details('every option that differs from its default', pre(recipe, 'Recipe'))}"
        + details("stages and their commands", table(stages, numbers=("nodes",)))
        + details("the model's config.json", pre(yaml.safe_dump(plan.model_config_hf, sort_keys=False), "config.json"))
    )


def _events(events: list[dict[str, Any]]) -> str:
    rows = [
        {
            "time": time_text(float(e["time"])),
            "event": e["kind"],
            "stage": e.get("stage"),
            "node": e.get("node"),
            "text": shortened(e.get("text"), 600),
        }
        for e in events[-200:]
    ]
    return table(rows, caption="The newest events of the journal" if len(events) > 200 else "The run's journal")
