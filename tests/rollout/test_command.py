"""The exact command lines and environments of the engines, and the layouts that are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plans import bound, plan_of
from vime.errors import BadInput
from vime.rollout.command import engine_command, model_path, thread_binding

R1_LEADER = """-m vime.rollout.serve /shared/models/DeepSeek-R1
--tensor-parallel-size 8 --enable-expert-parallel --data-parallel-size 8 --data-parallel-size-local 1
--data-parallel-address {address} --data-parallel-rpc-port {rpc}
--host {address} --port {port} --api-server-count 1
--middleware vime.rollout.fast_answers.GuardedAnswers
--enable-scale-out --disable-uvicorn-access-log --uvicorn-log-level warning
--served-model-name policy --weight-transfer-config {{"backend":"vime"}} --logprobs-mode processed_logprobs
--seed {seed} --enable-sleep-mode --gpu-memory-utilization 0.7
--speculative-config {{"method":"mtp","num_speculative_tokens":4}}"""

R1_FOLLOWER = """-m vime.rollout.serve /shared/models/DeepSeek-R1
--tensor-parallel-size 8 --enable-expert-parallel --data-parallel-size 8 --data-parallel-size-local 1
--data-parallel-address {address} --data-parallel-rpc-port {rpc} --headless --data-parallel-start-rank {position}
--served-model-name policy --weight-transfer-config {{"backend":"vime"}} --logprobs-mode processed_logprobs
--seed {seed} --enable-sleep-mode --gpu-memory-utilization 0.7
--speculative-config {{"method":"mtp","num_speculative_tokens":4}}"""


def test_log_probs_are_those_of_all_tokens():
    def mode(*flags: str) -> str:
        plan = plan_of("tiny-qwen3", *flags, nodes=1)
        words = engine_command(plan, bound(1), plan.engines[0], 0, range(2)).argv
        return words[words.index("--logprobs-mode") + 1]

    assert mode("--rollout-temperature", "0.7") == "processed_logprobs"
    assert mode("--rollout-top-p", "0.9") == mode("--rollout-top-k", "5") == "raw_logprobs"


def test_the_r1_recipe_on_16_nodes_is_two_engines_of_one_leader_and_seven_headless_followers():
    plan, binding = plan_of("deepseek-r1", nodes=16, cluster="example"), bound(16, port_offset=100)
    assert [engine.nodes for engine in plan.engines] == [tuple(range(8)), tuple(range(8, 16))]
    for engine, address, seed in zip(plan.engines, ("10.0.0.10", "10.0.0.18"), (42, 43), strict=True):
        for position in range(8):
            command = engine_command(plan, binding, engine, position, range(96))
            text = R1_FOLLOWER if position else R1_LEADER
            wanted = text.format(
                address=address, port=engine.port + 100, rpc=engine.aux_port + 100, seed=seed, position=position
            )
            assert list(command.argv) == wanted.split()
            assert command.serves == (position == 0)
            assert command.url == f"http://{address}:{engine.port + 100}"


def test_the_environment_of_an_r1_node_names_its_gpus_address_interface_and_ports_and_no_secret():
    plan, binding = plan_of("deepseek-r1", nodes=16, cluster="example"), bound(16, interface="ib0")
    engine = plan.engines[1]
    assert engine_command(plan, binding, engine, 3, range(96)).env == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "10.0.0.21",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        "VLLM_PORT": str(engine.aux_port + 1),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "VLLM_USE_DEEP_GEMM_E8M0": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }


def test_what_the_profile_sets_is_not_set_again_by_an_engine():
    plan = plan_of("deepseek-r1", nodes=16, cluster="example")
    given = {
        "NCCL_SOCKET_IFNAME": "ib0,ib1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
    }
    plan = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"env": given})})
    env = engine_command(plan, bound(16, interface="bond0"), plan.engines[0], 0, range(96)).env
    assert not {*given, "GLOO_SOCKET_IFNAME"} & env.keys()


def test_scales_are_rounded_to_powers_of_two_only_where_the_checkpoint_has_such():
    plan = plan_of("deepseek-r1", nodes=16)
    hf = {**plan.model_config_hf, "quantization_config": {**plan.model_config_hf["quantization_config"]}}
    hf["quantization_config"]["scale_fmt"] = "ue8m0"
    rounded = plan.model_copy(update={"model_config_hf": hf})
    for one, expected in ((plan, "0"), (rounded, None)):
        found = engine_command(one, bound(16), one.engines[0], 0, [0]).env
        assert found.get("VLLM_USE_DEEP_GEMM_E8M0") == expected


def test_no_option_is_given_twice():
    """vLLM warns of it, even where it takes several."""
    for plan in (plan_of("deepseek-r1", nodes=16), plan_of("tiny-deepseek-r1", nodes=2)):
        words = engine_command(plan, bound(len(plan.nodes)), plan.engines[0], 0, range(8)).argv
        options = [word for word in words if word.startswith("--")]
        assert len(options) == len(set(options))


def test_the_tiny_recipe_loads_the_bf16_copy_with_what_processors_need():
    plan = plan_of("tiny-deepseek-r1", nodes=2)
    command = engine_command(plan, bound(2), plan.engines[1], 0, [0, 1])
    wanted = f"""-m vime.rollout.serve /shared/models/tiny-deepseek-r1-bf16 --tensor-parallel-size 1
        --host 10.0.0.11 --port {plan.engines[1].port} --api-server-count 1
        --middleware vime.rollout.fast_answers.GuardedAnswers
        --enable-scale-out --disable-uvicorn-access-log --uvicorn-log-level warning
        --served-model-name policy --weight-transfer-config {{"backend":"vime-shm"}}
        --logprobs-mode processed_logprobs --seed 43 --no-enable-chunked-prefill
        -cc.custom_ops+=-rotary_embedding --max-model-len 256 --max-num-seqs 64 --enforce-eager"""
    assert list(command.argv) == wanted.split()
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert command.env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert "CUDA_VISIBLE_DEVICES" not in command.env


def test_two_nodes_of_two_slots_as_data_parallel_two_times_tensor_parallel_two():
    flags = ("--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "4", "--vllm-data-parallel-size", "2")
    plan = plan_of("tiny-qwen3", *flags, nodes=2)
    leader, follower = (engine_command(plan, bound(2), plan.engines[0], p, [4, 5, 6, 7]) for p in (0, 1))
    assert " ".join(leader.argv).startswith(
        "-m vime.rollout.serve /shared/models/tiny-qwen3 --tensor-parallel-size 2 --data-parallel-size 2 "
        "--data-parallel-size-local 1 --data-parallel-address 10.0.0.10"
    )
    assert "--headless --data-parallel-start-rank 1" in " ".join(follower.argv)
    assert leader.env["VLLM_CPU_OMP_THREADS_BIND"] == "4,5|6,7"


def test_deepep_and_other_flags_of_vllm_pass_through_in_vllms_spelling():
    flags = (
        "--vllm-all2all-backend",
        "deepep_low_latency",
        "--vllm-no-enable-prefix-caching",
        "--vllm-max-model-len",
        "40960",
    )
    plan = plan_of("deepseek-r1", *flags, nodes=16, cluster="example")
    text = " ".join(engine_command(plan, bound(16), plan.engines[0], 0, [0]).argv)
    assert "--all2all-backend deepep_low_latency" in text
    assert "--no-enable-prefix-caching" in text
    assert "--max-model-len 40960" in text


@pytest.mark.parametrize(
    ("recipe", "flags", "reason"),
    [
        ("tiny-deepseek-r1", ("--vllm-data-parallel-size", "2"), "dies at the first request"),
        ("tiny-deepseek-r1", ("--vllm-enable-expert-parallel",), "wrong values"),
    ],
)
def test_layouts_that_vllm_computes_wrong_on_processors_are_refused_when_the_run_is_planned(recipe, flags, reason):
    slots = ("--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "2")
    with pytest.raises(BadInput, match=reason):
        plan_of(recipe, *slots, *flags, nodes=1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--vllm-logprobs-mode", "raw_logits"),
        ("--vllm-middleware", "a.b"),
        ("--vllm-no-enable-scale-out", None),
        ("--vllm-seed", "3"),
        ("--vllm-enable-sleep-mode", None),
    ],
)
def test_flags_that_the_run_decides_are_refused_with_the_reason(flag, value):
    with pytest.raises(BadInput, match="cannot be given"):
        plan_of("tiny-deepseek-r1", flag, *([value] if value else []), nodes=1)


def test_an_unquantised_checkpoint_is_loaded_as_it_is():
    assert model_path(plan_of("tiny-qwen3", nodes=1)) == "/shared/models/tiny-qwen3"


@given(st.lists(st.integers(0, 255), min_size=1, max_size=64, unique=True), st.integers(1, 16))
def test_every_rank_gets_cores_and_no_core_is_left_out_when_there_are_enough(cpus, ranks):
    groups = [[int(cpu) for cpu in part.split(",")] for part in thread_binding(cpus, ranks).split("|")]
    assert len(groups) == ranks
    if len(cpus) >= ranks:
        assert [cpu for group in groups for cpu in group] == cpus
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    else:
        assert all(len(group) == 1 and group[0] in cpus for group in groups)


@pytest.mark.e2e
def test_vllms_own_parser_takes_every_command_line():
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    for plan, binding in (
        (plan_of("deepseek-r1", nodes=16, cluster="example"), bound(16)),
        (plan_of("tiny-deepseek-r1", nodes=1), bound(1)),
    ):
        for position in (0, len(plan.engines[0].nodes) - 1):
            argv = engine_command(plan, binding, plan.engines[0], position, [0]).argv
            args = parser.parse_args(["serve", *argv[2:]])
            assert args is not None
            assert args.served_model_name == ["policy"]
            assert args.headless == (position > 0)


def test_the_engines_run_the_checkpoints_own_code_only_if_it_is_trusted():
    plan, binding = plan_of("deepseek-r1", nodes=16, cluster="example"), bound(16)
    assert "--trust-remote-code" not in engine_command(plan, binding, plan.engines[0], 0, range(96)).argv
    for flags in (["--trust-remote-code"], ["--trust-remote-code", "--vllm-trust-remote-code"]):
        plan = plan_of("deepseek-r1", *flags, nodes=16, cluster="example")
        for position in (0, 1):
            argv = engine_command(plan, binding, plan.engines[0], position, range(96)).argv
            assert argv.count("--trust-remote-code") == 1
