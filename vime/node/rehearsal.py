"""`python -m vime.node.rehearsal --run DIR`: tries once, on one node, what the run would otherwise learn hours later.

Imports the plug-ins and the libraries that the recipe turns on, looks for its profiler, loads the tokenizer and renders
a row of every prompt set, asks the reward server for a reward, and reads every scale of the checkpoint. Runs before the
first byte is converted. Ends with the first failure in one line, and the exit code of its cause.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vime.data.rows import Columns
from vime.errors import BadInput, VimeError
from vime.models.scales import check_scales
from vime.planning.plugins import plugin_targets
from vime.recipe.prompt_sources import PromptSource, all_sources
from vime.recipe.schema import Recipe
from vime.rewards.names import REMOTE
from vime.rewards.pool import CallFailed, CallTimeout
from vime.rewards.remote import RemoteReward, RewardServerAway
from vime.rollout.data import Tokenisation, first_prompt, load_tokenizer
from vime.run.folder import read_plan
from vime.run.messages import report
from vime.run.plan import Plan
from vime.samples import Prompt, new_group

IMPORT_S = 180.0
"""Longest import of a library or plug-in: from a shared file system the first one is slow."""
SERVER_S = 120.0
"""Longest wait for a reward server that is away; a run that has begun waits for `--rm-patience`."""
ANSWER = "The answer is \\boxed{1}."
"""Response that the reward server is asked about."""
ENGINE = "transformer_engine"
_LOAD = "import sys; from vime.rewards.worker import load; load(sys.argv[1])"


@dataclass(frozen=True)
class Library:
    """A library that the recipe turns on."""

    module: str
    option: str
    otherwise: str
    """Flags to give where the library cannot be had."""


def libraries(recipe: Recipe) -> Iterator[Library]:
    """Libraries that a recipe needs on its GPUs besides torch, vLLM and Megatron-core."""
    misc, backend = recipe.misc, str(recipe.engine.vllm.get("all2all_backend") or "")
    if misc.moe_enable_deepep:
        without = "--no-moe-enable-deepep --moe-token-dispatcher-type alltoall"
        yield Library("deep_ep", "--moe-enable-deepep", without)
    if backend.startswith("deepep"):
        yield Library("deep_ep", f"--vllm-all2all-backend {backend}", "another --vllm-all2all-backend")
    if misc.attention_backend in ("flash", "fused"):
        option = f"--attention-backend {misc.attention_backend}"
        yield Library(f"{ENGINE}.pytorch", option, "--attention-backend auto")
        if misc.attention_backend == "flash":
            yield Library("flash_attn", option, "--attention-backend auto")
    if recipe.optimizer.use_precision_aware_optimizer and not recipe.optimizer.optimizer_cpu_offload:
        yield Library(f"{ENGINE}.pytorch", "--use-precision-aware-optimizer", "--optimizer-cpu-offload too")


def check_libraries(plan: Plan) -> Iterator[str]:
    """Import each library in a process of its own. Yields what was imported; raises BadInput for one that cannot be."""
    for library in libraries(plan.recipe) if plan.on_gpu else ():
        if why := _failure("-c", f"import {library.module}"):
            raise BadInput(
                f"{library.option} needs {library.module}, which cannot be imported here ({why}): install it "
                f"(docs/environments.md), or give {library.otherwise}"
            )
        yield library.module
    if plan.on_gpu and importlib.util.find_spec(ENGINE) and (why := _failure("-c", f"import {ENGINE}.pytorch")):
        # The trainer builds its layers of it wherever it is installed.
        raise BadInput(f"{ENGINE} is installed here but cannot be imported ({why}): repair it, or uninstall it")


def check_profiler(plan: Plan) -> Iterator[str]:
    """Look for Nsight Systems where ranks are to run under it. Yields its path; raises BadInput without it."""
    options, ours = plan.recipe.profile, Path(sys.executable).parent
    if options.profiler != "nsys" or not options.profile_ranks:
        return
    if (nsys := shutil.which("nsys")) is None:
        raise BadInput(
            "--profiler nsys: nsys is not on the path here: install Nsight Systems, or give --profiler torch"
        )
    if (python := shutil.which("python")) is None or Path(python).parent != ours:
        raise BadInput(
            f"--profiler nsys: Ray starts ranks under nsys with the first python on the path, which is {python}: put "
            f"{ours} first on it (the profile's venv does), or give --profiler torch"
        )
    yield nsys


def check_plugins(recipe: Recipe) -> Iterator[str]:
    """Import each plug-in in a process of its own. Yields what was loaded; raises BadInput for one that cannot be."""
    for option, target in plugin_targets(recipe):
        if why := _failure("-c", _LOAD, target):
            raise BadInput(f"{option} {target} cannot be loaded here: {why}")
        yield target


def _failure(*words: str) -> str | None:
    """Last line of a Python process that failed; None if it succeeded."""
    try:
        done = subprocess.run(
            [sys.executable, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IMPORT_S
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {IMPORT_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    print(done.stderr, file=sys.stderr)
    ended = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    return lines[-1][:300] if lines else ended


def check_prompts(plan: Plan) -> Iterator[Prompt]:
    """The first prompt of every set, rendered and tokenised. Raises BadInput for a tokenizer or template that fails."""
    recipe = plan.recipe
    sources = [source for source in all_sources(recipe) if not recipe.misc.load_debug_rollout_data]
    if not sources:
        return
    checkpoint = recipe.checkpoint
    tokenizer = load_tokenizer(checkpoint.hf_checkpoint or "", trust_remote_code=checkpoint.trust_remote_code)
    how = Tokenisation(tokenizer, recipe.rollout.apply_chat_template, recipe.rollout.apply_chat_template_kwargs)
    for source in sources:
        yield _first(source, how, Columns.of(recipe))


def _first(source: PromptSource, how: Tokenisation, columns: Columns) -> Prompt:
    try:
        return first_prompt(source.path, how, columns)
    except BadInput as error:
        raise BadInput(f"{source.flag}: {error}") from error


async def check_server(recipe: Recipe, prompt: Prompt) -> float:
    """Reward of a made-up answer to the prompt, from the recipe's server. Raises BadInput without one."""
    options, url = recipe.rollout, recipe.rollout.rm_url or ""
    (sample,) = new_group(0, prompt, 1).samples
    sample.response = ANSWER
    try:
        async with RemoteReward(url, patience_s=min(options.rm_patience, SERVER_S)) as ask:
            return await ask(sample, options.rm_timeout)
    except (CallFailed, CallTimeout, RewardServerAway) as error:
        raise BadInput(f"--rm-url {url}: {error}: start the server, or correct its address") from error


def rehearse(plan: Plan) -> Iterator[str]:
    """Everything that was tried, as text. Raises BadInput for the first that failed."""
    recipe = plan.recipe
    for module in check_libraries(plan):
        yield f"{module} imported"
    for nsys in check_profiler(plan):
        yield f"{nsys} found"
    for target in check_plugins(recipe):
        yield f"{target} loaded"
    prompts = list(check_prompts(plan))
    if prompts:
        yield f"{len(prompts)} prompts rendered, the first has {len(prompts[0].token_ids)} tokens"
    if recipe.rollout.rm_type == REMOTE and prompts:
        yield f"the reward server answered {asyncio.run(check_server(recipe, prompts[0])):g}"
    if (folder := recipe.checkpoint.hf_checkpoint) and plan.model_config_hf.get("quantization_config"):
        check_scales(Path(folder), quantised=True)
        yield "all scales are finite"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.node.rehearsal", description="Tries what the run will need.")
    parser.add_argument("--run", required=True, help="run folder with plan.json")
    args = parser.parse_args(argv)
    tried = []
    try:
        for text in rehearse(read_plan(args.run)):
            print(text, flush=True)
            tried.append(text)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    report("result", tried=tried)
    return 0


if __name__ == "__main__":
    sys.exit(main())
