"""Real vLLM servers on this machine for tests."""
# ruff: noqa: ASYNC220, ASYNC240 (a test's event loop may wait for a file or a fork)

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tests.support import patience
from vime.rollout.client import EngineClient, EngineError, SamplingSettings
from vime.rollout.command import MODEL_NAME
from vime.rollout.guard import KEY_VARIABLE


@contextlib.asynccontextmanager
async def engine(
    model: Path, log: Path, *arguments: str, backend: str = "vime-shm", gpus: str | None = None
) -> AsyncIterator[EngineClient]:
    """A server of the folder, ready; it is ended on leaving. `gpus`: those that it sees, as CUDA names them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_hex(16)
    environment = {
        **os.environ,
        KEY_VARIABLE: key,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus, "VLLM_HOST_IP": "127.0.0.1"}),
    }
    command = [
        *(sys.executable, "-m", "vime.rollout.serve", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", str(port), "--served-model-name", MODEL_NAME, "--max-model-len", "256", "--max-num-seqs", "8"),
        *("--enforce-eager", "--enable-scale-out", "-cc.custom_ops+=-rotary_embedding"),
        *("--middleware", "vime.rollout.guard.RequireKey"),
        *("--weight-transfer-config", json.dumps({"backend": backend}), *arguments),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        async with EngineClient(f"http://127.0.0.1:{port}", key) as client:
            await _ready(client, process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(patience.PROCESS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _ready(client: EngineClient, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + patience.ENGINE
    while True:
        assert process.poll() is None, f"the engine ended: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"the engine is not ready: {log.read_text()[-3000:]}"
        try:
            await client.generate([1, 2, 3], SamplingSettings(max_tokens=1), deadline_s=patience.ANSWER)
        except EngineError:
            await asyncio.sleep(0.5)
        else:
            return


async def log_probs(
    client: EngineClient, prompt: list[int], tokens: int = 6, replica: int | None = None
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probs, from one data-parallel replica if it is given."""
    answer = await client.generate(
        prompt,
        SamplingSettings(max_tokens=tokens, temperature=0.0),
        deadline_s=patience.ANSWER,
        data_parallel_rank=replica,
    )
    return answer.token_ids, answer.log_probs
