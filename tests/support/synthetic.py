"""A synthetic run folder, so named since nothing was trained, for tests of its readers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.folder import write_plan

HOSTILE = "<script>document.title='owned'</script>\"'&</td>\u202e\x00"


def synthetic_run(
    folder: Path,
    rollouts: int,
    *,
    cause: str = "SUCCESS",
    name: str = "synthetic <run> & 'quotes'",
    text: str = HOSTILE,
) -> Path:
    """plan.json, metrics, timeline, samples and events of `rollouts` rollouts of the full recipe.

    `text` is what model, nodes and logs said.
    """
    run = folder / "runs" / name
    run.mkdir(parents=True)
    recipe = load_recipe("deepseek-r1", [])
    checks = Checks(inputs=False, run_folder=False)
    plan = make_plan(
        recipe,
        cluster=load_cluster("example"),
        nodes=16,
        base_dir=folder,
        run_dir=run,
        run_name=run.name,
        checks=checks,
    )
    command = ("--recipe", "deepseek-r1", "--nodes", "16", "--", "--lr", "2e-6")
    write_plan(plan.model_copy(update={"command": command}))
    draw = random.Random(0)
    _write(run / "metrics.jsonl", [_metrics(step, rollouts, draw) for step in range(rollouts)])
    # Ranks in the newest rollouts only: making the spans of all takes a minute, and the report leaves them out.
    lines = (line for step in range(rollouts) for line in _timeline(step, draw, ranks=128 * (step >= rollouts - 120)))
    _write(run / "timeline.jsonl", list(lines))
    (run / "rollouts").mkdir()
    for step in range(0, rollouts, max(1, rollouts // 20)):
        sample = {"index": 1, "group": 0, "prompt": text, "response": f"{text} {step}", "label": text}
        rewards = [{**sample, "reward": reward, "tokens": 5, "status": "completed"} for reward in (0.0, 0.0, 1.0, 1.0)]
        _write(run / "rollouts" / f"{step:06d}.jsonl", rewards)
    nodes = [{"node": f"node{i:02d}", "address": f"10.0.0.{i}", "cpus": 96, "result": text or "fit"} for i in range(16)]
    start = {"time": 1.7e9, "kind": "run-start", "text": "start", "data": {"job": "4711"}}
    preflight = {"time": 1.7e9 + 1, "kind": "preflight", "stage": "preflight", "text": "fit", "data": {"nodes": nodes}}
    end = {
        "time": 1.7e9 + 2,
        "kind": "run-end",
        "stage": "train",
        "node": "node03",
        "text": f"run ended: {text or cause}",
    }
    _write(run / "lengths.jsonl", [_lengths(step, rollouts, draw) for step in range(rollouts)])
    _write(run / "events.jsonl", [start, preflight, {**end, "data": {"cause": cause, "log_tail": text}}])
    return run


def _lengths(step: int, rollouts: int, draw: random.Random) -> dict:
    """256 samples, of which longer ones are wrong more often."""
    tokens = [min(32768, int(draw.lognormvariate(8.7 + 0.5 * step / rollouts, 0.6))) for _ in range(256)]
    rewards = [float(draw.random() < (0.35 + 0.4 * step / rollouts) * (1.3 - count / 40000)) for count in tokens]
    return {"rollout_id": step, "tokens": tokens, "rewards": rewards}


def _timeline(step: int, draw: random.Random, ranks: int) -> list[dict]:
    """The driver's phases, and the spans of ranks that wait for each other."""
    start = 1.7e9 + step * 540
    phases = ((0, "generate", 300), (300, "train", 200), (500, "sync", 5), (505, "save", 30))
    lines: list[dict] = [
        {"name": name, "rollout_id": step, "track": "driver", "start": start + at, "end": start + at + length}
        for at, name, length in phases
    ]
    began = start + 300
    spans = []
    for _ in range(ranks):
        busy = draw.uniform(150, 195)
        steps = (("log_probs", 0, 40), ("train", 40, 200), ("wait", busy, 200))
        spans.append([[name, began + first, began + last] for name, first, last in steps])
    return [*lines, {"rollout_id": step, "ranks": spans}] if spans else lines


def _metrics(step: int, rollouts: int, draw: random.Random) -> dict[str, float]:
    done = step / rollouts
    return {
        "step": step,
        "time": 1.7e9 + step,
        "rollout/raw_reward": 0.3 + 0.4 * done + draw.gauss(0, 0.03),
        "rollout/response_length": 6000 + 4000 * done + draw.gauss(0, 200),
        "rollout/response_length_max": 32768,
        "rollout/filter_drops": draw.randrange(20),
        "rollout/zero_std_share": 0.2 * done,
        "rollout/truncated_share": 0.05,
        "rollout/tail_time": 60 + draw.gauss(0, 5),
        "train/pg_loss": draw.gauss(0, 0.01),
        "train/kl_loss": 0.01 * math.sqrt(done),
        "train/ppo_kl": abs(draw.gauss(0, 0.001)),
        "train/entropy": 0.8 - 0.3 * done,
        "train/grad_norm": abs(draw.gauss(0.5, 0.1)),
        "train/pg_clipfrac": 0.01,
        "train/train_rollout_logprob_abs_diff": 0.01 + abs(draw.gauss(0, 0.001)),
        "perf/rollout_tokens_per_s": 40000 + draw.gauss(0, 1000),
        "perf/tokens_per_gpu_per_s": 150 + draw.gauss(0, 5),
        "perf/sync_time": 5.0,
        "sync/time": 3.5,
        "perf/mfu": 0.31 + draw.gauss(0, 0.01),
        "perf/engine_cache_hit_rate": 0.4,
        "perf/draft_acceptance_rate": 0.7,
        "perf/engine_idle_share": 0.02,
        "eval/aime": 0.4 + 0.2 * done,
        "eval/aime/pass@8": 0.6 + 0.2 * done,
    }


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
