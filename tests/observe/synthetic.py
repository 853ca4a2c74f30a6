"""A run folder made of numbers alone, for tests of what reads one: named so, since nothing was trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.planning.io import write_plan
from vime.recipe.load import load_recipe

HOSTILE = "<script>document.title='owned'</script>\"'&</td>\u202e\x00"


def synthetic_run(folder: Path, rollouts: int, *, cause: str = "SUCCESS") -> Path:
    """plan.json, metrics, timeline, samples and events of `rollouts` rollouts of the full recipe."""
    run = folder / "runs" / "synthetic <run> & 'quotes'"
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
    write_plan(plan)
    draw = random.Random(0)
    _write(run / "metrics.jsonl", [_metrics(step, rollouts, draw) for step in range(rollouts)])
    spans = []
    for step in range(rollouts):
        for offset, name, length in ((0, "generate", 300), (300, "train", 200), (500, "sync", 5), (505, "save", 30)):
            start = 1.7e9 + step * 540 + offset
            spans.append({"name": name, "rollout_id": step, "track": "driver", "start": start, "end": start + length})
    _write(run / "timeline.jsonl", spans)
    (run / "rollouts").mkdir()
    for step in range(0, rollouts, max(1, rollouts // 20)):
        sample = {"index": 1, "group": 0, "prompt": HOSTILE, "response": HOSTILE, "label": HOSTILE, "reward": 1.0}
        _write(run / "rollouts" / f"{step:06d}.jsonl", [{**sample, "tokens": 5, "status": "completed"}] * 4)
    end = {"time": 1.7e9, "kind": "run-end", "stage": "train", "node": "node03", "text": f"run ended: {HOSTILE}"}
    _write(run / "events.jsonl", [{**end, "data": {"cause": cause, "log_tail": HOSTILE}}])
    return run


def _metrics(step: int, rollouts: int, draw: random.Random) -> dict[str, float]:
    done = step / rollouts
    return {
        "step": step,
        "time": 1.7e9 + step,
        "rollout/raw_reward": 0.3 + 0.4 * done + draw.gauss(0, 0.03),
        "rollout/response_len_mean": 6000 + 4000 * done + draw.gauss(0, 200),
        "rollout/response_len_max": 32768,
        "train/pg_loss": draw.gauss(0, 0.01),
        "train/kl_loss": 0.01 * math.sqrt(done),
        "train/entropy": 0.8 - 0.3 * done,
        "train/grad_norm": abs(draw.gauss(0.5, 0.1)),
        "train/pg_clipfrac": 0.01,
        "perf/generate_time": 300 + draw.gauss(0, 10),
        "perf/train_time": 200 + draw.gauss(0, 10),
        "eval/aime": 0.4 + 0.2 * done,
    }


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
