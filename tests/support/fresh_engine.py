"""Test program: an in-process engine that loads a folder, without a server.

    python -m tests.support.fresh_engine FOLDER OUTPUT [--speculate]

Writes as JSON to OUTPUT the checksums of its weights, and its answers to PROMPTS: tokens and log-probs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support import patience

PROMPTS = [[2, 9, 16, 8, 17, 3], [2, 7, 7, 16, 12, 17, 3]]
TOKENS = 6
SPECULATION = {"method": "mtp", "num_speculative_tokens": 1}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def load(folder: str, *, speculate: bool = False) -> Any:
    """vLLM's engine over a folder, as the servers of these tests are configured."""
    from vllm import LLM

    return LLM(
        model=folder,
        max_model_len=256,
        max_num_seqs=8,
        enforce_eager=True,
        compilation_config={"custom_ops": ["-rotary_embedding"]},
        speculative_config=dict(SPECULATION) if speculate else None,
    )


def answer(llm: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probs."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=0)
    output = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0].outputs[0]
    steps = zip(output.logprobs, output.token_ids, strict=True)
    return list(output.token_ids), [step[token].logprob for step, token in steps]


async def fresh(folder: Path, *options: str) -> dict[str, Any]:
    """Output of this file, run as a program."""
    output = folder.with_suffix(".json")
    log = folder.with_suffix(".log")
    with log.open("wb") as stream:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.fresh_engine", str(folder), str(output), *options),
            env={**os.environ, **ENVIRONMENT}, cwd=Path(__file__).parents[2], stdout=stream, stderr=stream,
        )  # fmt: skip
        try:
            code = await asyncio.wait_for(process.wait(), patience.ENGINE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert code == 0, log.read_text()[-3000:]
    found = json.loads(output.read_text())
    return {**found, "answers": [(tokens, log_probs) for tokens, log_probs in found["answers"]]}


def main(folder: str, output: str, *options: str) -> None:
    llm = load(folder, speculate="--speculate" in options)
    (checksums,) = llm.collective_rpc("compute_weight_checksums")
    found = {"checksums": checksums, "answers": [answer(llm, prompt) for prompt in PROMPTS]}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
