"""One engine over two nodes, data parallel 2 x tensor parallel 2, on a dense model."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from tests.support import patience
from tests.support.reference_log_probs import reference_log_probs
from tests.support.slurm_cluster import DevCluster
from tests.support.small_base import write_qwen3
from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.rollout.client import EngineClient, SamplingSettings
from vime.run.folder import write_binding, write_plan
from vime.run.plan import Binding, BoundNode

pytestmark = pytest.mark.e2e

READY_SECONDS = str(patience.ENGINE)
PROMPTS = [[6, 7, 8, 16, 9, 20], [3, 4, 5], [9, 9, 9, 9]]
KEY = "a-key-of-this-run"
NODE = """
import sys
from vime.run.folder import read_binding, read_plan
from vime.rollout.engine import EngineServer
run, position = sys.argv[1], int(sys.argv[2])
server = EngineServer(read_plan(run), read_binding(run), 0, position, "a-key-of-this-run")
server.start()
try:
    print(server.wait_ready(float(sys.argv[3])), flush=True)
    sys.stdin.read()
finally:
    server.stop()
"""


@dataclass(frozen=True)
class Engine:
    url: str
    base: Path


@pytest.fixture(scope="module", params=["two_addresses", "two_nodes"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Up on two addresses of this machine, or on two nodes of the development cluster."""
    base = tmp_path_factory.mktemp("base")
    write_qwen3(base)
    cluster: DevCluster | None = None
    if request.param == "two_nodes":
        cluster = request.getfixturevalue("four_nodes")
        hosts = [("node01", "10.77.0.1", "eth0"), ("node02", "10.77.0.2", "eth0")]
    else:
        hosts = [(socket.gethostname(), "127.0.0.2", "lo"), (socket.gethostname(), "127.0.0.3", "lo")]
    flags = ["--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "4", "--vllm-data-parallel-size", "2"]
    plan = make_plan(
        load_recipe("tiny-qwen3", flags),
        cluster=load_cluster("devcluster"),
        nodes=2,
        base_dir=base,
        run_dir=base / "run",
        run_name="engine",
        checks=Checks(inputs=False, run_folder=False),
    )
    assert (plan.engines[0].nodes, plan.engines[0].tensor_parallel_size) == ((0, 1), 2)
    write_plan(plan)
    nodes = [BoundNode(index=i, host=h, address=a, interface=eth) for i, (h, a, eth) in enumerate(hosts)]
    write_binding(plan.run_dir, Binding(nodes=tuple(nodes), port_offset=0))
    entries = [cluster.enter(node.index) if cluster else [] for node in nodes]
    parts = []
    for node, entry in zip(nodes, entries, strict=True):
        command = [sys.executable, "-c", NODE, plan.run_dir, str(node.index), READY_SECONDS]
        parts.append(subprocess.Popen([*entry, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        urls = []
        for part in parts:
            assert part.stdout is not None
            urls.append(part.stdout.readline().strip())
        assert urls[0] == urls[1] == f"http://{nodes[0].address}:{plan.engines[0].port}", logs(base)
        yield Engine(urls[0], base)
    finally:
        for part in parts:
            assert part.stdin is not None
            part.stdin.close()
        for part in parts:
            part.wait(patience.PROCESS)
    for entry in entries:
        left = subprocess.run([*entry, "sh", "-c", "ps -eww -o args=; ls /dev/shm"], capture_output=True, text=True)
        assert str(base) not in left.stdout
        assert "vllm_" not in left.stdout


def logs(base: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted((base / "run" / "logs" / "engines").glob("*.log")))


@pytest.mark.parametrize("rank", [0, 1])
async def test_every_rank_answers_with_the_log_probs_of_transformers(engine: Engine, rank: int) -> None:
    async with EngineClient(engine.url, KEY) as client:
        settings = SamplingSettings(24)
        answers = await asyncio.gather(
            *(
                client.generate(prompt, settings, deadline_s=patience.ANSWER, data_parallel_rank=rank)
                for prompt in PROMPTS
            )
        )
    scored = [(prompt, answer.token_ids, 1.0) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    for wanted, answer in zip(reference_log_probs(engine.base / "tiny-qwen3", scored), answers, strict=True):
        assert fmean(abs(a - b) for a, b in zip(wanted, answer.log_probs, strict=True)) < 0.05


async def test_a_request_goes_to_the_rank_that_its_header_names(engine: Engine) -> None:
    async def made(client: EngineClient) -> dict[str, float]:
        counts = r'^vllm:generation_tokens_total\{[^}]*engine="(\d)"[^}]*\} (\S+)'
        return {rank: float(tokens) for rank, tokens in re.findall(counts, await client.metrics(), re.MULTILINE)}

    async with EngineClient(engine.url, KEY) as client:
        for rank, other in (("1", "0"), ("0", "1")):
            before = await made(client)
            answers = [
                await client.generate(
                    PROMPTS[0], SamplingSettings(8), deadline_s=patience.ANSWER, data_parallel_rank=int(rank)
                )
                for _ in range(3)
            ]
            after = await made(client)
            assert after[rank] - before[rank] == sum(len(answer.token_ids) for answer in answers)
            assert after[other] == before[other]


async def test_a_seed_gives_the_same_tokens_again(engine: Engine) -> None:
    async with EngineClient(engine.url, KEY) as client:

        async def tokens(seed: int) -> list[int]:
            answer = await client.generate(PROMPTS[1], SamplingSettings(24), deadline_s=patience.ANSWER, seed=seed)
            return answer.token_ids

        first = await tokens(7)
        alone, *others = await asyncio.gather(tokens(7), *(tokens(seed) for seed in range(8, 14)))
    assert alone == first
    assert len({tuple(each) for each in (first, *others)}) > 1
