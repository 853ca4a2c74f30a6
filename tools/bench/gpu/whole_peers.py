"""The peers of whole.py, each in a process of its own: `whole_peers.py PEER --folder DIR --run RUN [-- recipe flags]`.

Writes its figures as JSON to the file of `--answer`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]

from vime.models.flops import utilisation  # noqa: E402
from vime.observe.samples import read_rollout  # noqa: E402
from vime.recipe.load import load_recipe  # noqa: E402
from vime.run.folder import read_binding, read_plan  # noqa: E402
from vime.run.metrics import read_metrics, series  # noqa: E402
from vime.run.plan import Plan  # noqa: E402
from vime.samples import Rollout  # noqa: E402

REPEATS = 2
PROFILED_GROUPS, PROFILE_ROWS = 4, 25


def last_rollout(run_dir: Path) -> Rollout:
    """The newest rollout that the run trained on."""
    return read_rollout(run_dir / "rollouts", max(read_metrics(run_dir)))


def timed(call: Callable[[], object], runs: int = REPEATS) -> float:
    """Median seconds after one call more."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of vLLM's offline engine on the last rollout's prompts and lengths, after one pass to warm up."""
    from vllm import LLM, SamplingParams

    plan, rollout = read_plan(args.run), last_rollout(args.run)
    options = {name: value for name, value in plan.recipe.engine.vllm.items() if value is not None}
    started = time.perf_counter()
    engine = LLM(str(plan.recipe.checkpoint.hf_checkpoint), logprobs_mode="processed_logprobs", **options)
    start = time.perf_counter() - started
    prompts: Any = [{"prompt_token_ids": list(sample.prompt_ids)} for sample in rollout.samples]
    lengths = [len(sample.response_ids) for sample in rollout.samples]
    asked = [
        SamplingParams(max_tokens=n, ignore_eos=True, temperature=1.0, logprobs=0, detokenize=False) for n in lengths
    ]
    speeds = []
    for _ in range(1 + REPEATS):
        engine.reset_prefix_cache()
        started = time.perf_counter()
        answers: Any = engine.generate(prompts, asked, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert [len(answer.outputs[0].token_ids) for answer in answers] == lengths
        speeds.append(sum(lengths) / seconds)
    speed = statistics.median(speeds[1:])
    return {"tokens_per_s": speed, "seconds": sum(lengths) / speed, "all": speeds, "start_seconds": start}


def serving(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the run's engine command with the same requests, all sent at once."""
    from vime.rollout.client import EngineClient
    from vime.rollout.engine import EngineServer

    plan, rollout = read_plan(args.run), last_rollout(args.run)
    server = EngineServer(plan, read_binding(args.run), 0, 0, "whole")
    started = time.perf_counter()
    server.start()
    try:
        url = server.wait_ready(300)
        start = time.perf_counter() - started

        async def measure() -> list[float]:
            limit = plan.recipe.engine.vllm_server_concurrency
            async with EngineClient(url, "whole", concurrency=limit) as client:
                speeds = []
                for _ in range(1 + REPEATS):
                    await client.reset_prefix_cache()
                    began = time.perf_counter()
                    answers = await asyncio.gather(
                        *(
                            client.generate(
                                list(sample.prompt_ids),
                                plan.recipe.sampling,
                                max_tokens=len(sample.response_ids),
                                deadline_s=300,
                            )
                            for sample in rollout.samples
                        )
                    )
                    tokens = sum(len(answer.token_ids) for answer in answers)
                    speeds.append(tokens / (time.perf_counter() - began))
                return speeds

        speeds = asyncio.run(measure())
    finally:
        server.stop()
    return {"tokens_per_s": statistics.median(speeds[1:]), "all": speeds, "start_seconds": start}


def training(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and MFU of Megatron-core's own step and of vime's, over the last rollout."""
    from vime.megatron.worker import TrainWorker

    plan, rollout = changed(read_plan(args.run), args), last_rollout(args.run)
    worker = TrainWorker(plan, 0)
    worker.setup("127.0.0.1", 29611)
    torch.cuda.reset_peak_memory_stats()
    bare = bare_step(worker, plan, rollout)
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in rollout.samples]
    name = torch.cuda.get_device_name()

    def measured(step: Callable[[], object]) -> dict[str, Any]:
        seconds = timed(step)
        return {
            "seconds": seconds,
            "tokens_per_s": sum(lengths) / seconds,
            "mfu": utilisation(plan.model, lengths, seconds=seconds, gpus=1, device=name),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }

    steps = {"bare": bare, "vime": lambda: worker.train(rollout)}
    found: dict[str, Any] = {which: measured(step) for which, step in steps.items()}
    if args.profile:
        few = Rollout(rollout.rollout_id, rollout.groups[:PROFILED_GROUPS])
        short = {"bare": bare_step(worker, plan, few), "vime": lambda: worker.train(few)}
        args.profile.write_text("\n\n".join(f"{which}\n{profiled(step)}" for which, step in short.items()))
    perf = plan.recipe.perf
    found["options"] = f"{perf.max_tokens_per_gpu} tokens, recompute {perf.recompute_granularity}"
    return found


def changed(plan: Plan, args: argparse.Namespace) -> Plan:
    """The run's plan with the recipe that these flags give."""
    recipe = load_recipe(str(args.folder / "dense.yaml"), args.flags)
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"perf": recipe.perf, "misc": recipe.misc})})


def bare_step(worker: Any, plan: Plan, rollout: Rollout) -> Callable[[], object]:
    """Megatron-core's forward-backward-step over the rollout as vime packs it, on the same model."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vime.megatron.microbatch import Padding, RolloutTokens, make_batch
    from vime.megatron.passes import Packer

    optimizer, device = worker._ready.optimizer, torch.device("cuda", 0)
    data = RolloutTokens.of([(sample.prompt_ids, sample.response_ids) for sample in rollout.samples])
    packed = Packer(plan.recipe.perf, plan.layout).shares(
        data, range(len(data.sequences)), plan.recipe.perf.max_tokens_per_gpu
    )[0]
    batches = [make_batch(data, members, Padding(), cp_rank=0, cp_size=1, device=device) for members in packed]

    def forward(iterator: Iterator[Any], chunk: Any) -> Any:
        batch = next(iterator)
        bounds, longest = batch.bounds, batch.longest
        described = PackedSeqParams("thd", bounds, bounds, bounds, bounds, longest, longest)
        losses = chunk(batch.tokens, batch.positions, None, labels=batch.targets[None], packed_seq_params=described)
        mask = (batch.response_index >= 0).float()

        def measure(output: torch.Tensor) -> Any:
            loss = (output.view(-1).float() * mask).sum() / data.response_tokens
            return loss, torch.zeros((), dtype=torch.int, device=device), {}

        return losses, measure

    def step() -> None:
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=optimizer.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.size(1),
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()

    return step


def profiled(step: Callable[[], object]) -> str:
    """The kernels that a step spends the GPU's time in, and how long it takes with the profiler on."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=PROFILE_ROWS, max_name_column_width=90)
    return f"{seconds:.3f} s\n{table}"


def copies(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a copy of the sync's bytes inside the GPU's memory; bytes a second over PCIe, pinned, each way."""
    sizes = [value for _, value in series(read_metrics(args.run), "sync/bytes")]
    size = int(statistics.median(sizes))
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return {
        "device_seconds": timed(lambda: target.copy_(source)),
        "to_host": size / timed(lambda: host.copy_(source, non_blocking=True)),
        "to_device": size / timed(lambda: target.copy_(host, non_blocking=True)),
    }


PEERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "generation": generation,
    "serving": serving,
    "training": training,
    "copies": copies,
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--answer", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = list(argv[cut + 1 :])
    args.answer.write_text(json.dumps(PEERS[args.peer](args)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
