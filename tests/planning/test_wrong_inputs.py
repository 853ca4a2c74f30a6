"""Wrong inputs of every kind, with the words of the refusal. All are refused by a dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fake_checkpoint import base_dir as base_dir
from vime.errors import BadInput
from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.plan import Plan

DRY = Checks(inputs=False, run_folder=False)
FLAGS = [
    ("--learning-rate 1", "here it is --lr"),
    ("--group-rm", "group:package.module:function"),
    ("--wandb-key x", "set WANDB_API_KEY"),
    ("--node 2", "--nodes, before --"),
    ("--rollout-bach-size 2", "did you mean --rollout-batch-size?"),
    ("--sglang-mem-fraction-static 0.7", "--vllm-gpu-memory-utilization"),
    ("--critic-num-nodes 1", "not built"),
    ("--fp16", "a flag of Megatron that vime does not use"),
    ("--lr", "takes one value, given none"),
    ("--lr fast", "--lr is 'fast'"),
    ("--lr nan", "finite number"),
    ("--lr -1", "greater than or equal to 0"),
    ("--min-lr 1", "is above --lr"),
    ("--adam-beta1 1", "less than 1"),
    ("--optimizer lion", "give one of adam"),
    ("--colocate 5", "is a switch"),
    ("--env A", "takes KEY=VALUE"),
    ("--num-layers 7", "--num-layers is 7, but config.json implies 3"),
    ("--rotary-base 1", "--rotary-base is 1, but config.json implies"),
    ("--moe-layer-freq x*y", "--moe-layer-freq"),
    ("--rm-type deepscalar", "--rm-type deepscalar is unknown"),
    ("--rm-type none", "--rm-type is not set"),
    ("--rm-type remote_rm", "here it is remote"),
    ("--rm-type remote", "needs --rm-url"),
    ("--rm-type remote --rm-url host:8000", "give an address such as"),
    ("--rm-type remote --rm-url http://host:port/", "give an address such as"),
    ("--rm-type my.rewards.score", "a function is written my.rewards:score"),
    ("--rm-type my-rewards:score", "write package.module:function"),
    ("--rm-type vime.rewards.math_answer:no_such", "defines no no_such"),
    ("--rm-type group:vime.rewards.text:no_such", "defines no no_such"),
    ("--dynamic-sampling-filter-path nonzero", "--dynamic-sampling-filter-path nonzero is unknown"),
    ("--dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
     "here it is check_reward_nonzero_std"),
    ("--dynamic-sampling-filter-path vime.rewards.filters:missing", "defines no missing"),
    ("--rollout-temperature 0", "must be above 0"),
    ("--rollout-top-p 0", "greater than 0"),
    ("--rollout-top-p 0.9 --rollout-temperature 0.7", "--rollout-top-p needs --rollout-temperature 1, here 0.7"),
    ("--rollout-top-k 20 --rollout-temperature 1.2", "--rollout-top-k needs --rollout-temperature 1, here 1.2"),
    ("--rollout-top-k -2", "greater than or equal to -1"),
    ("--eval-top-p 2", "less than or equal to 1"),
    ("--eval-temperature -1", "greater than or equal to 0"),
    ("--n-samples-per-prompt 0", "greater than or equal to 1"),
    ("--n-samples-per-eval-prompt 0", "greater than or equal to 1"),
    ("--rollout-max-response-len 0", "greater than or equal to 1"),
    ("--rollout-max-response-len 100000", "leaves no room for a prompt"),
    ("--eval-prompt-data aime", "give a name and a path in turn"),
    ("--eval-interval 5 --eval-prompt-data []", "--eval-interval needs --eval-prompt-data"),
    ("--max-staleness -1", "greater than or equal to 0"),
    ("--rm-timeout 0", "greater than 0"),
    ("--eps-clip-c 1", "greater than 1"),
    ("--kl-loss-type k9", "input should be"),
    ("--use-kl-loss --kl-loss-coef 0.1 --kl-loss-type k1", "cannot be trained on"),
    ("--num-steps-per-rollout 3", "does not divide"),
    ("--over-sampling-batch-size 1", "is less than --rollout-batch-size"),
    ("--vllm-kv-cache-dtype fp9", "--vllm-kv-cache-dtype is 'fp9'"),
    ("--vllm-all2all-backend deepep_low_latenc", "did you mean deepep_low_latency?"),
    ("--vllm-dtype bf16", "--vllm-dtype is 'bf16'"),
    ('--vllm-speculative-config {"method":"egale"}', "'method' is 'egale', which vLLM"),
    ('--vllm-structured-outputs-config {"backend":"x"}', "'backend' is 'x'"),
    ("--vllm-max-model-len 32k", "--vllm-max-model-len is '32k'"),
    ("--vllm-port 80", "the plan decides the ports"),
    ("--vllm-max-num-seq 3", "did you mean --vllm-max-num-seqs?"),
    ("--vllm-enforce-eager --vllm-max-cudagraph-capture-size 8", "exclude each other"),
    ("--sequence-parallel", "needs --tensor-model-parallel-size above 1"),
    ("--wandb-mode sometimes", "input should be 'online' or 'offline'"),
]  # fmt: skip
ROWS = [
    ("not-json.jsonl", b"question,answer\n1+1?,2\n", "is not JSON"),
    ("no-prompt.jsonl", b'{"conversations": []}\n', "prompt"),
    ("latin1.jsonl", b'{"prompt": "caf\xe9?", "label": "2"}\n', "is not UTF-8"),
    ("empty.jsonl", b"", "it has no rows"),
    ("prompts.csv", b"prompt,label\n", "neither JSON lines nor parquet"),
    ("no-label.jsonl", b'{"prompt": "1+1?"}\n', "label"),
    ("null-label.jsonl", b'{"prompt": "1+1?", "label": null}\n', "label"),
    ("messages.jsonl", b'{"prompt": [{"content": "1+1?"}], "label": "2"}\n', "role"),
]


def planned(base: Path, *flags: str) -> Plan:
    recipe = load_recipe("tiny-deepseek-r1", flags)
    return make_plan(recipe, cluster=load_cluster("local"), base_dir=base, run_dir=base / "run", checks=DRY)


def words(line: str) -> list[str]:
    """The words of a line; a JSON value has no blanks."""
    return line.split(" ")


@pytest.mark.parametrize(("line", "said"), FLAGS, ids=[line for line, _ in FLAGS])
def test_a_wrong_option_is_refused_by_the_dry_run(base_dir: Path, line: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        planned(base_dir, *words(line))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content", "said"), ROWS, ids=[name for name, _, _ in ROWS])
def test_unusable_prompts_are_refused_by_the_dry_run(base_dir: Path, name: str, content: bytes, said: str) -> None:
    (base_dir / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        planned(base_dir, "--prompt-data", str(base_dir / name))
    assert said in str(caught.value)


def test_the_table_is_long_enough() -> None:
    assert len(FLAGS) + len(ROWS) >= 60


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--n-samples-per-prompt 1 --num-steps-per-rollout 1", "in a group of one every advantage is 0"),
        ("--n-samples-per-prompt 1 --num-steps-per-rollout 1 "
         "--dynamic-sampling-filter-path check_reward_nonzero_std", "can never pass"),
        ("--rollout-top-p 0.9", "--rollout-top-p 0.9 biases training"),
        ("--rollout-top-k 20", "--rollout-top-k 20 biases training"),
        ("--partial-rollout", "trains on tokens of older weights"),
        ("--wandb-group g", "--wandb-group: no effect without --use-wandb"),
        ("--rm-url http://host/", "--rm-url: no effect without --rm-type remote"),
        ("--rm-type no_such_module:score", "there is no module no_such_module here"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_teach_or_has_no_effect_gets_a_note(base_dir: Path, line: str, said: str) -> None:
    assert any(said in note for note in planned(base_dir, *words(line)).notes)


def test_deepscaler_needs_a_template_that_thinks(base_dir: Path) -> None:
    template = base_dir / "tiny-deepseek-r1" / "tokenizer_config.json"
    template.write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    said = "which the chat template of"
    assert any(said in note for note in planned(base_dir, "--rm-type", "deepscaler").notes)
    template.write_text(json.dumps({"chat_template": "<think>{{ messages[0].content }}</think>"}))
    assert not any(said in note for note in planned(base_dir, "--rm-type", "deepscaler").notes)
