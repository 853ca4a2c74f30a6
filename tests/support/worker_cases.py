"""Trainer runs in real processes: one start of N processes runs a list of cases, each with its own layout.

As a module: the function that a test calls. As a script (`python worker_cases.py CASES.json RANK`): one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Ranks that a small layout has no place for wait for its end; who starts them ends them all before this.
PORT_DEADLINE = 10 * 3600


@dataclass
class Case:
    """Rollouts trained at a layout, and what is measured."""

    name: str
    hf_checkpoint: str
    layout: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes of the groups of the base recipe."""
    rollouts: list[int] = field(default_factory=lambda: [0])
    save_after: list[int] = field(default_factory=list)
    save_loaded: bool = False
    """Save before any training, under the rollout that was loaded."""
    score: bool = False
    """Also log-probs of the first rollout's samples, before training."""
    die_in_last_save: bool = False
    """End the process, as SIGKILL would, when the last save has begun."""


@dataclass
class Result:
    next_rollout_id: int = -1
    loaded_from: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """In the checkpoint folder when the process died."""
    printed: str = ""
    error: str = ""


BASE: dict[str, dict[str, Any]] = {
    "model": {"bf16": False},
    "perf": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64},
    "rollout": {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "num_rollout": 8, "num_steps_per_rollout": 2},
    # With an epsilon far above every gradient, Adam's first step is the gradient times rate / epsilon.
    "optimizer": {"lr": 50.0, "adam_eps": 1e4, "weight_decay": 0.0, "clip_grad": 1.0},
    "checkpoint": {"conversion": "direct"},
}


def run_cases(
    cases: list[Case],
    processes: int,
    folder: Path,
    environment: dict[str, str] | None = None,
    *,
    deadline: float | None = None,
) -> dict[str, Result]:
    """Run the cases one after the other in `processes` processes; results by name. `deadline` is in seconds."""
    from tests.support import patience  # the script has no path to it

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cases.json"
    file.write_text(json.dumps([asdict(case) for case in cases]))
    # Killed writers leave their sockets, whose path has to be short.
    scratch = tempfile.mkdtemp(prefix="vt-")
    environment = {**(environment or os.environ), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["TMPDIR"] = scratch
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(file), str(rank)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = wait_for_all(started, patience.GROUP if deadline is None else deadline)
    finally:
        for process in started:
            # A killed trainer leaves the helpers of its writer.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)
    text = "".join(f"--- rank {r}\n" + (folder / f"rank{r}.log").read_text()[-3000:] for r in range(processes))
    assert codes == [0] * processes, f"exit codes {codes}\n{text}"
    results = {case.name: Result(**json.loads((folder / f"{case.name}.json").read_text())) for case in cases}
    for result in results.values():
        result.printed = (folder / "rank0.log").read_text()
    return results


def wait_for_all(started: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Exit codes; ends early when one has failed, since the others then wait for it."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        codes = [process.poll() for process in started]
        if any(codes) or None not in codes:
            return codes
        time.sleep(0.1)
    return [process.poll() for process in started]


def rollout_of(number: int, vocabulary: int) -> Any:
    """A rollout that depends on its number alone: groups of different lengths, one of equal rewards."""
    import random

    from vime.samples import Group, Rollout, Sample, Status

    draw, teacher = random.Random(1000 + number), random.Random(2000 + number)
    groups = []
    for g in range(4):
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(3, 9))]
        samples = []
        for s in range(4):
            length = draw.randint(1, 30)
            response = [draw.randrange(vocabulary) for _ in range(length)]
            mask = [int(draw.random() < 0.9) for _ in response]
            reward = 1.0 if g == 0 else float(draw.random() < 0.5)
            log_probs = [draw.uniform(-5, -4) for _ in response]
            samples.append(
                Sample(
                    4 * g + s, g, "", prompt, response_ids=response, log_probs=log_probs, loss_mask=mask,
                    teacher_log_probs=[teacher.uniform(-6, -3) for _ in response], reward=reward,
                    status=Status.COMPLETED,
                )
            )  # fmt: skip
        groups.append(Group(g, samples))
    return Rollout(number, groups)


def plan_of(case: Case, folder: Path) -> Any:
    from vime.models.config import ModelConfig
    from vime.recipe.parallel import ParallelLayout
    from vime.recipe.schema import Recipe
    from vime.run.plan import Cluster, Plan, Ports

    config = ModelConfig.from_folder(case.hf_checkpoint)
    groups = {name: {**BASE.get(name, {}), **case.recipe.get(name, {})} for name in {*BASE, *case.recipe}}
    groups["checkpoint"] = {"hf_checkpoint": case.hf_checkpoint, **groups["checkpoint"]}
    ports = dict.fromkeys(Ports.model_fields, 1)
    return Plan(
        run_name=case.name,
        run_dir=str(folder),
        base_dir=None,
        recipe=Recipe(name="test", **groups),  # type: ignore[arg-type]
        model_config_hf=dict(config.hf),
        cluster=Cluster(name="test", kind="local"),
        layout=ParallelLayout(**case.layout),
        nodes=(),
        trainer_ranks=(),
        engines=(),
        ports=Ports(**ports),
        stages=(),
    )


def run_case(case: Case, rank: int, port: int, folder: Path) -> Result:
    from vime.errors import VimeError
    from vime.megatron.worker import TrainWorker

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        # Megatron sets them for the only model of a process.
        os.environ.pop(name, None)
    worker = TrainWorker(plan_of(case, folder), rank, key=b"of this test")
    result = Result()
    try:
        start = worker.setup("127.0.0.1", port)
        result.next_rollout_id, result.loaded_from, result.extra = start.next_rollout_id, start.loaded_from, start.extra
        vocabulary = worker.config.vocab_size
        if case.score:
            samples = rollout_of(case.rollouts[0], vocabulary).samples
            result.scores = worker.log_probs([(s.prompt_ids, s.response_ids) for s in samples])
        if case.save_loaded:
            result.saved.append(worker.save(start.next_rollout_id - 1, {}))
        for number in case.rollouts:
            result.metrics.append(worker.train(rollout_of(number, vocabulary)))
            if number in case.save_after:
                result.saved.append(worker.save(number, {"cursor": number}))
        if case.die_in_last_save:
            result.left = sorted(path.name for path in Path(result.saved[-1]).parent.iterdir())
            write(result, case, folder)
            os._exit(0)
    except VimeError as error:
        result.error = f"{type(error).__name__}: {error}"
    finally:
        worker.close()
    return result


def main(file: str, rank: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    sys.path.insert(0, str(HERE.parents[1]))
    folder = Path(file).parent
    cases = [Case(**case) for case in json.loads(Path(file).read_text())]
    for number, case in enumerate(cases):
        if rank >= case.layout.get("world_size", 1):
            continue
        result = run_case(case, rank, _port(folder, number, rank), folder)
        if rank == 0:
            write(result, case, folder)


def write(result: Result, case: Case, folder: Path) -> None:
    (folder / f"{case.name}.json").write_text(json.dumps(asdict(result)))


def _port(folder: Path, number: int, rank: int) -> int:
    """A free port that rank 0 finds and the others read."""
    from tests.support.single import free_port

    file = folder / f"port{number}"
    if rank == 0:
        port = free_port()
        draft = file.with_suffix(".draft")
        draft.write_text(str(port))
        draft.rename(file)
        return port
    end = time.monotonic() + PORT_DEADLINE
    while not file.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"rank 0 never wrote {file}")
        time.sleep(0.05)
    return int(file.read_text())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
