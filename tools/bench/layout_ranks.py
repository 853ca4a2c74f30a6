"""The DeepSeek-R1 recipe's own layout with as many processes as it has ranks, against one process, at tiny widths.

    python tools/bench/layout_ranks.py --folder /scratch/ranks [--ranks 128] [--deadline 1800]

61 layers; TP8 x CP4 x PP4 (last stage 13) with EP32 x ETP1 on 128 ranks, then a resume at TP8 x CP2 x PP4 on 64. All
processes are forked from one that has loaded torch and Megatron, so 128 of them take about 20 GB; on 16 cores or more
it takes minutes. `--ranks 16`, `4` and `1` are the same at small layouts. Compared with one process: losses and
gradient norms of two rollouts of two steps, every parameter after the first rollout (the optimizer's epsilon is far
above the gradients, so a step is the gradient times a constant), and the second rollout after a save and a resume.
Prints a line for each; exits 1 where one differs or a process fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import save_file

from vime.checkpoint.torch_dist import TorchDistReader
from vime.errors import VimeError
from vime.megatron.worker import TrainWorker
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.run.plan import Cluster, Plan, Ports
from vime.samples import Group, Rollout, Sample, Status

HF: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 61,
    "first_k_dense_replace": 3, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16,
    "n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
    },
    "max_position_embeddings": 1280, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "vocab_size": 128,
}  # fmt: skip
ENDS = {"pp": 4, "last_stage_layers": 13, "sequence_parallel": True}
LAYOUTS: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
    128: ({"tp": 8, "cp": 4, "ep": 32, "etp": 1, **ENDS}, {"tp": 8, "cp": 2, "ep": 16, "etp": 1, **ENDS}),
    16: ({"tp": 2, "cp": 2, "ep": 4, "etp": 1, **ENDS}, {"tp": 2, "ep": 2, "etp": 1, **ENDS}),
    4: (
        {"tp": 2, "pp": 2, "ep": 2, "last_stage_layers": 13, "sequence_parallel": True},
        {"tp": 2, "ep": 2, "sequence_parallel": True},
    ),
    1: ({}, {}),
}
"""By number of ranks: the layout, and that of the resume on half of them."""
TOLERANCE = 2e-3


def write_checkpoint(folder: Path) -> None:
    """An HF folder with random weights."""
    folder.mkdir(parents=True)
    config, draw = ModelConfig.from_hf(HF), torch.Generator().manual_seed(0)
    tensors = {}
    for param in params_of(config):
        for part in param.parts:
            value = torch.randn(part.shape, generator=draw) * 0.05
            tensors[part.name] = value + 1 if "norm" in part.name else value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF))


def rollout_of(number: int) -> Rollout:
    draw = random.Random(number)
    groups = []
    for index in range(4):
        prompt = [draw.randrange(HF["vocab_size"]) for _ in range(draw.randint(3, 9))]
        samples = []
        for one in range(4):
            response = [draw.randrange(HF["vocab_size"]) for _ in range(draw.randint(1, 30))]
            samples.append(
                Sample(
                    4 * index + one, index, "", prompt, response_ids=response, log_probs=[-4.8] * len(response),
                    reward=draw.random(), status=Status.COMPLETED,
                )
            )  # fmt: skip
        groups.append(Group(index, samples))
    return Rollout(number, groups)


def plan_of(folder: Path, layout: ParallelLayout, save: Path, load: Path | None) -> Plan:
    recipe = Recipe(
        name="ranks",
        model={"bf16": False},  # type: ignore[arg-type]
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64},  # type: ignore[arg-type]
        rollout={"num_rollout": 2, "num_steps_per_rollout": 2},  # type: ignore[arg-type]
        optimizer={"lr": 50.0, "adam_eps": 1e4, "weight_decay": 0.0},  # type: ignore[arg-type]
        checkpoint={  # type: ignore[arg-type]
            "hf_checkpoint": str(folder / "hf"), "conversion": "direct", "save": str(save), "load": str(load or save)
        },
    )  # fmt: skip
    return Plan(
        run_name="ranks", run_dir=str(folder), base_dir=None, recipe=recipe, model_config_hf=HF,
        cluster=Cluster(name="ranks", kind="local"), layout=layout, nodes=(), trainer_ranks=(), engines=(),
        ports=Ports(**dict.fromkeys(Ports.model_fields, 1)), stages=(),
    )  # fmt: skip


def train(plan: Plan, rank: int, port: int, rollouts: list[int], out: Path) -> None:
    """One rank: the rollouts, a save after rollout 0, and rank 0's metrics into `out`."""
    torch.set_num_threads(1)
    worker = TrainWorker(plan, rank)
    try:
        worker.setup("127.0.0.1", port)
        metrics = []
        for number in rollouts:
            metrics.append(worker.train(rollout_of(number)))
            if number == 0:
                worker.save(0, {})
    finally:
        worker.close()
    if rank == 0:
        out.write_text(json.dumps(metrics))


def forked(count: int, work: Callable[[int], None], deadline_s: float) -> None:
    """Run `work(rank)` in forked processes. Raises VimeError where one fails or the time is over; none is left."""
    sys.stdout.flush()
    children: dict[int, int] = {}
    for rank in range(count):
        if not (pid := os.fork()):
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:  # noqa: BLE001 -- the child's last stop: its failure goes to the log and its exit code
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children[pid] = rank
    end = time.monotonic() + deadline_s
    try:
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                rank = children.pop(pid)
                if status:
                    raise VimeError(f"rank {rank} of {count} failed with status {status}")
            elif time.monotonic() > end:
                raise VimeError(f"{len(children)} of {count} ranks did not end within {deadline_s:.0f} s")
            else:
                time.sleep(0.05)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run(name: str, layout: ParallelLayout, folder: Path, rollouts: list[int], deadline_s: float, load: str = "") -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plan = plan_of(folder, layout, folder / name, folder / load if load else None)
    start, out = time.monotonic(), folder / f"{name}.json"
    forked(layout.world_size, lambda rank: train(plan, rank, port, rollouts, out), deadline_s)
    print(f"{name}: {layout.world_size} ranks, {time.monotonic() - start:.0f} s", flush=True)
    return json.loads(out.read_text())


def same_metrics(what: str, mine: dict[str, float], theirs: dict[str, float]) -> bool:
    names = ("train/loss", "train/pg_loss", "train/entropy", "train/grad_norm", "train/train_rollout_logprob_abs_diff")
    worst = max(abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-3) for name in names)
    print(f"{what}: worst relative difference of losses and norms {worst:.2e}")
    return worst < TOLERANCE


def same_parameters(many: Path, one: Path) -> bool:
    """Every parameter after two steps, as a share of what the steps changed most."""
    config = ModelConfig.from_hf(HF)
    mine, theirs = TorchDistReader(many, config), TorchDistReader(one, config)
    worst, where, count = 0.0, "", 0
    for param in params_of(config):
        if param in theirs:
            a, b = mine.read(param), theirs.read(param)
            difference = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
            worst, where = max((worst, where), (difference, param.name))
            count += 1
    print(f"{count} parameters after two steps: worst relative difference {worst:.2e} ({where})")
    return worst < TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for the checkpoints")
    parser.add_argument("--ranks", type=int, choices=sorted(LAYOUTS), default=128)
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds for each of the three runs")
    args = parser.parse_args()
    first, second = LAYOUTS[args.ranks]
    write_checkpoint(args.folder / "hf")
    one = run("one", ParallelLayout(), args.folder, [0, 1], args.deadline)
    many = run("many", ParallelLayout(world_size=args.ranks, **first), args.folder, [0, 1], args.deadline)
    half = ParallelLayout(world_size=max(1, args.ranks // 2), **second)
    resumed = run("resumed", half, args.folder, [1], args.deadline, load="many")
    good = [
        same_metrics("rollout 0", many[0], one[0]),
        same_metrics("rollout 1", many[1], one[1]),
        same_parameters(args.folder / "many", args.folder / "one"),
        same_metrics("rollout 1 after the resume", resumed[0], one[1]),
    ]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
