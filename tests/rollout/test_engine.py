"""A real vLLM engine on a random checkpoint of DeepSeek-V3's shape: from its start to its end."""

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import aiohttp
import pytest

from tests.support import patience
from tests.support.plans import plan_of
from tests.support.reference_log_probs import reference_log_probs
from vime.errors import DeadlineExceeded
from vime.rollout.client import UNVERSIONED, EngineClient, SamplingSettings
from vime.rollout.engine import EngineFailed, EngineServer
from vime.rollout.sampler import Sampler
from vime.run.folder import write_binding, write_plan
from vime.run.plan import Binding, BoundNode
from vime.samples import Status

pytestmark = pytest.mark.e2e

KEY = "a-key-of-this-run"
PROMPT = [6, 7, 8, 16, 9, 20]


def tool():
    path = Path(__file__).parents[2] / "tools" / "make_tiny_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_tiny_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as `$BASE_DIR` after the cast stage: bf16 weights, tokenizer, data. The weights are random."""
    import torch

    from tests.support import tiny_hf

    base = tmp_path_factory.mktemp("base")
    make = tool()
    config = {k: v for k, v in make.CONFIGS["deepseek-v3"].items() if k != "quantization_config"}
    tensors = tiny_hf.random_tensors(config)
    smaller = {name: value * 0.3 if value.dim() == 2 else value for name, value in tensors.items()}
    folder = tiny_hf.write_folder(base / "tiny-deepseek-r1-bf16", config, smaller)
    assert smaller["lm_head.weight"].dtype == torch.bfloat16
    make.save_tokenizer(folder)
    make.save_tokenizer(base / "tiny-deepseek-r1")
    make.make_data(base, 0)
    return base


def plan_and_binding(base, run_dir, *flags, port_offset=0):
    plan = plan_of(
        "tiny-deepseek-r1", "--dynamic-sampling-filter-path", "none", *flags, nodes=1, base=base, run_dir=run_dir
    )
    node = BoundNode(index=0, host=socket.gethostname(), address="127.0.0.1")
    return plan, Binding(nodes=(node,), port_offset=port_offset)


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    """The engine, up; stopped at the end, and then nothing of it may be left."""
    run_dir = tmp_path_factory.mktemp("run")
    plan, binding = plan_and_binding(base, run_dir)
    server = EngineServer(plan, binding, 0, 0, KEY)
    shared = set(os.listdir("/dev/shm"))
    server.start()
    try:
        server.wait_ready(patience.ENGINE)
        yield server, plan
    finally:
        group, scratch = server.pid, server._scratch
        server.stop()
    assert group is not None
    assert members(group) == []
    assert not os.path.exists(scratch)
    assert set(os.listdir("/dev/shm")) <= shared


def members(group: int) -> list[int]:
    """Processes of a process group, without those that have ended and only wait to be reaped."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(folder.name))
    return found


async def test_logprobs_agree_with_transformers_within_5_hundredths_of_a_nat(engine, base):
    server, _ = engine
    async with EngineClient(server.command.url, KEY) as client:
        answers = await asyncio.gather(
            *(
                client.generate(PROMPT, SamplingSettings(24, temperature=t), deadline_s=patience.ANSWER)
                for t in (1.0, 1.0, 0.5)
            )
        )
    scored = [(PROMPT, answer.token_ids, t) for answer, t in zip(answers, (1.0, 1.0, 0.5), strict=True)]
    for wanted, answer in zip(reference_log_probs(base / "tiny-deepseek-r1-bf16", scored), answers, strict=True):
        assert answer.weight_versions == [UNVERSIONED] * len(answer.token_ids)
        difference = [abs(a - b) for a, b in zip(wanted, answer.log_probs, strict=True)]
        assert fmean(difference) < 0.05, difference


async def test_logprobs_are_over_all_tokens_whatever_part_is_drawn_from(base, tmp_path):
    """Each token of top-k 2 has at least half of what remains; its log-prob over all tokens is far lower."""
    plan, binding = plan_and_binding(base, tmp_path, "--rollout-top-k", "2", port_offset=200)
    server = EngineServer(plan, binding, 0, 0, KEY)
    server.start()
    try:
        server.wait_ready(patience.ENGINE)
        async with EngineClient(server.command.url, KEY) as client:
            settings = replace(plan.recipe.sampling, max_tokens=24)
            answer = await client.generate(PROMPT, settings, deadline_s=patience.ANSWER)
    finally:
        server.stop()
    [wanted] = reference_log_probs(base / "tiny-deepseek-r1-bf16", [(PROMPT, answer.token_ids, 1.0)])
    difference = [abs(a - b) for a, b in zip(wanted, answer.log_probs, strict=True)]
    assert fmean(difference) < 0.05, difference
    assert min(wanted) < -1.5


async def test_seeded_prompts_of_more_tokens_than_one_step_takes(engine):
    """A prompt that vLLM cuts in two would end an engine on processors."""
    server, _ = engine
    async with EngineClient(server.command.url, KEY) as client:
        asked = [
            client.generate([*PROMPT, *([6 + n % 12] * 200)], SamplingSettings(4), deadline_s=patience.ANSWER, seed=n)
            for n in range(48)
        ]
        answers = await asyncio.gather(*asked)
    assert all(len(answer.token_ids) in range(1, 5) for answer in answers)


async def test_every_route_wants_the_key(engine):
    server, _ = engine
    routes = (
        "/pause",
        "/collective_rpc",
        "/update_weights",
        "/v1/completions",
        "/inference/v1/generate",
        "/invocations",
    )
    async with aiohttp.ClientSession() as session:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for route in routes:
                async with session.post(server.command.url + route, headers=headers, json={}) as answer:
                    assert answer.status == 401, route
            for route in ("/health", "/metrics", "/weight_info", "/docs"):
                async with session.get(server.command.url + route, headers=headers) as answer:
                    assert answer.status == 401, route


async def test_streams_and_text_are_refused(engine):
    server, _ = engine
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "policy", "token_ids": PROMPT, "sampling_params": {"max_tokens": 2}}
    async with aiohttp.ClientSession() as session:
        for more, status in (({}, 200), ({"stream": True}, 400), ({"output_mode": "text"}, 400)):
            url = server.command.url + "/inference/v1/generate"
            async with session.post(url, headers=headers, json=body | more) as answer:
                assert answer.status == status, more


def test_the_key_is_in_no_command_line_and_the_log_is_private(engine):
    server, _ = engine
    for process in members(server.pid):
        assert KEY.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
    assert KEY not in server.log.read_text()
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600


def test_vllm_takes_every_option_without_a_warning(engine):
    server, _ = engine
    assert "duplicate" not in server.log.read_text()


async def test_a_pause_keeps_requests_and_an_abort_returns_their_tokens(engine):
    server, _ = engine
    endless = SamplingSettings(200)

    async with EngineClient(server.command.url, KEY) as client:

        async def until_whole():
            # Random weights end an answer by chance; ask until one was long enough to be paused in.
            while True:
                answer = await client.generate(PROMPT, endless, deadline_s=patience.ANSWER)
                if len(answer.token_ids) > 5:
                    return answer

        await client.pause("keep")
        kept = asyncio.create_task(until_whole())
        await asyncio.sleep(1)
        assert not kept.done()
        assert await client.is_paused()
        await client.resume()
        assert (await kept).finish_reason in ("stop", "length")

        await client.pause("keep")
        frozen = [asyncio.create_task(client.generate(PROMPT, endless, deadline_s=patience.ANSWER)) for _ in range(4)]
        await asyncio.sleep(0.5)
        assert await client.abort_all() == 4
        answers = await asyncio.gather(*frozen)
        assert {answer.finish_reason for answer in answers} == {"abort"}
        await client.resume()
        await client.reset_prefix_cache()
        assert await client.weight_info() == UNVERSIONED
        checksums = await client.checksums()
        assert checksums
        assert checksums == await client.checksums()


async def test_a_rollout_and_an_evaluation_with_the_real_tokenizer_and_rewards(engine):
    server, plan = engine
    async with EngineClient(server.command.url, KEY, concurrency=64) as client, Sampler(plan, [client]) as sampler:
        rollout = await sampler.generate(0)
        values = await sampler.evaluate(0)
    assert len(rollout.groups) == 32
    assert all(len(group.samples) == 8 for group in rollout.groups)
    assert all(sample.status in (Status.COMPLETED, Status.TRUNCATED) for sample in rollout.samples)
    assert rollout.metrics["perf/rollout_tokens_per_s"] > 50
    assert 0 <= values["eval/tiny-math"] < 0.2
    prompt = rollout.samples[0]
    assert prompt.prompt[0]["content"].endswith("=")
    assert prompt.prompt_ids[0] == 2  # <|user|>
    assert prompt.prompt_ids[-1] == 3  # <|assistant|>


async def test_partial_rollouts_go_on_after_a_real_abort(engine, base, tmp_path):
    server, _ = engine
    flags = ("--partial-rollout", "--rollout-max-response-len", "200", "--rollout-batch-size", "2")
    flags += ("--over-sampling-batch-size", "16", "--num-steps-per-rollout", "1", "--n-samples-per-prompt", "2")
    plan, _ = plan_and_binding(base, tmp_path, *flags)
    async with EngineClient(server.command.url, KEY, concurrency=64) as client, Sampler(plan, [client]) as sampler:
        await sampler.generate(0)
        state = json.loads(json.dumps(sampler.state_dict()))
        kept = {sample["status"] for group in state["kept"] for sample in group["samples"]}
        assert "aborted" in kept
        rollout = await sampler.generate(1)
    kept_groups = {group["index"] for group in state["kept"]}
    assert {group.index for group in rollout.groups} <= kept_groups


async def test_an_engine_that_dies_in_a_rollout_is_restarted_and_no_group_is_lost_or_doubled(engine, base, tmp_path):
    server, _ = engine
    flags = ("--rollout-max-response-len", "200", "--rollout-batch-size", "8", "--over-sampling-batch-size", "8")
    plan, _ = plan_and_binding(base, tmp_path, *flags, "--num-steps-per-rollout", "1")
    errors = []

    async def recover(index, error):
        errors.append((index, type(error).__name__))
        server.stop()
        server.start()
        await asyncio.to_thread(server.wait_ready, patience.ENGINE)

    client = EngineClient(server.command.url, KEY, concurrency=64)
    async with client, Sampler(plan, [client], recover=recover) as sampler:
        round_ = asyncio.create_task(sampler.generate(0))
        await asyncio.sleep(0.5)
        assert client.in_flight > 8
        os.kill(named(server.pid, "VLLM::EngineCor"), signal.SIGKILL)
        rollout = await round_
    assert len(errors) == 1
    assert [group.index for group in rollout.groups] == list(range(8))
    assert sorted(sample.index for sample in rollout.samples) == list(range(64))
    assert all(sample.status in (Status.COMPLETED, Status.TRUNCATED) for sample in rollout.samples)
    assert rollout.metrics["rollout/request_retries"] > 0


def named(group, name):
    return next(pid for pid in members(group) if Path(f"/proc/{pid}/comm").read_text().strip() == name)


def test_another_server_on_the_port_is_not_taken_for_the_engine(engine, base, tmp_path):
    plan, binding = plan_and_binding(base, tmp_path)
    server = EngineServer(plan, binding, 0, 0, KEY)
    server.start()
    try:
        with pytest.raises((EngineFailed, DeadlineExceeded), match=r"another server answers|exited with 1"):
            server.wait_ready(patience.ENGINE)
    finally:
        server.stop()


def test_a_checkpoint_that_is_not_there_is_named_by_the_engines_last_words(base, tmp_path):
    plan, binding = plan_and_binding(base, tmp_path, "--hf-checkpoint", str(tmp_path / "none"), port_offset=100)
    server = EngineServer(plan, binding, 0, 0, KEY)
    server.start()
    try:
        with pytest.raises(EngineFailed, match=r"exited with 1 before it was ready: .*none"):
            server.wait_ready(patience.ENGINE)
    finally:
        server.stop()


def test_an_engine_that_is_not_ready_in_time_says_so_and_stops(base, tmp_path):
    plan, binding = plan_and_binding(base, tmp_path, port_offset=100)
    server = EngineServer(plan, binding, 0, 0, KEY)
    server.start()
    group = server.pid
    with pytest.raises(DeadlineExceeded, match="engine 0 on node 0 was not ready within 1 s"):
        server.wait_ready(1)
    server.stop()
    assert group is not None
    assert members(group) == []


OWNER = """
import sys, time
from vime.run.folder import read_binding, read_plan
from vime.rollout.engine import EngineServer
server = EngineServer(read_plan(sys.argv[1]), read_binding(sys.argv[1]), 0, 0, "key")
server.start()
server.wait_ready(float(sys.argv[2]))
print(server.pid, flush=True)
time.sleep(3600)
"""


def test_a_server_ends_with_the_process_that_started_it(base, tmp_path, request):
    plan, binding = plan_and_binding(base, tmp_path, port_offset=100)
    write_plan(plan)
    write_binding(tmp_path, binding)
    # A killed owner leaves the server's folder, which a run's node-local one would go with.
    scratch = tempfile.mkdtemp(prefix="vt-")
    request.addfinalizer(lambda: shutil.rmtree(scratch))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), str(patience.ENGINE)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": scratch},
    )
    try:
        assert owner.stdout is not None
        group = int(owner.stdout.readline())
        assert len(members(group)) > 1
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    end = time.monotonic() + patience.PROCESS
    while members(group) and time.monotonic() < end:
        time.sleep(0.2)
    assert members(group) == []
