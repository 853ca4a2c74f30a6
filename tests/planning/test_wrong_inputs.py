"""Wrong inputs of every kind, with the stage that refuses each and the words of the refusal.

The dry run refuses all that it can know; the rehearsal, on a node before the first byte is converted, refuses what only
the node can: a tokenizer or template that fails, a library, a plug-in that fails when it is imported, a silent server.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.fake_checkpoint import base_dir as base_dir
from tests.support.small_base import write_deepseek
from vime.errors import BadInput
from vime.node.rehearsal import rehearse
from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.plan import Plan

ROOT = Path(__file__).parents[2]
DRY = Checks(inputs=False, run_folder=False)
DRY_RUN, REHEARSAL = "dry run", "rehearsal"
"""Stages at which an input is refused."""
FLAGS = [
    (DRY_RUN, "--learning-rate 1", "here it is --lr"),
    (DRY_RUN, "--group-rm", "group:package.module:function"),
    (DRY_RUN, "--wandb-key x", "set WANDB_API_KEY"),
    (DRY_RUN, "--node 2", "--nodes, before --"),
    (DRY_RUN, "--rollout-bach-size 2", "did you mean --rollout-batch-size?"),
    (DRY_RUN, "--sglang-mem-fraction-static 0.7", "--vllm-gpu-memory-utilization"),
    (DRY_RUN, "--critic-num-nodes 1", "not built"),
    (DRY_RUN, "--fp16", "a flag of Megatron that vime does not use"),
    (DRY_RUN, "--lr", "takes one value, given none"),
    (DRY_RUN, "--lr fast", "--lr is 'fast'"),
    (DRY_RUN, "--lr nan", "finite number"),
    (DRY_RUN, "--lr -1", "greater than or equal to 0"),
    (DRY_RUN, "--min-lr 1", "is above --lr"),
    (DRY_RUN, "--adam-beta1 1", "less than 1"),
    (DRY_RUN, "--optimizer lion", "give one of adam"),
    (DRY_RUN, "--colocate 5", "is a switch"),
    (DRY_RUN, "--env A", "takes KEY=VALUE"),
    (DRY_RUN, "--num-layers 7", "--num-layers is 7, but config.json implies 3"),
    (DRY_RUN, "--rotary-base 1", "--rotary-base is 1, but config.json implies"),
    (DRY_RUN, "--moe-layer-freq x*y", "--moe-layer-freq"),
    (DRY_RUN, "--rm-type deepscalar", "--rm-type deepscalar is unknown"),
    (DRY_RUN, "--rm-type none", "--rm-type is not set"),
    (DRY_RUN, "--rm-type remote_rm", "here it is remote"),
    (DRY_RUN, "--rm-type remote", "needs --rm-url"),
    (DRY_RUN, "--rm-type remote --rm-url host:8000", "give an address such as"),
    (DRY_RUN, "--rm-type remote --rm-url http://host:port/", "give an address such as"),
    (DRY_RUN, "--rm-type my.rewards.score", "a function is written my.rewards:score"),
    (DRY_RUN, "--rm-type my-rewards:score", "write package.module:function"),
    (DRY_RUN, "--rm-type vime.rewards.math_answer:no_such", "defines no no_such"),
    (DRY_RUN, "--rm-type group:vime.rewards.text:no_such", "defines no no_such"),
    (DRY_RUN, "--dynamic-sampling-filter-path nonzero", "--dynamic-sampling-filter-path nonzero is unknown"),
    (DRY_RUN,
     "--dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
     "here it is check_reward_nonzero_std"),
    (DRY_RUN, "--dynamic-sampling-filter-path vime.rewards.filters:missing", "defines no missing"),
    (DRY_RUN, "--rollout-temperature 0", "must be above 0"),
    (DRY_RUN, "--rollout-top-p 0", "greater than 0"),
    (DRY_RUN, "--rollout-top-p 0.9 --rollout-temperature 0.7", "needs --rollout-temperature 1, here 0.7"),
    (DRY_RUN, "--rollout-top-k 20 --rollout-temperature 1.2", "needs --rollout-temperature 1, here 1.2"),
    (DRY_RUN, "--rollout-top-k -2", "greater than or equal to -1"),
    (DRY_RUN, "--eval-top-p 2", "less than or equal to 1"),
    (DRY_RUN, "--eval-temperature -1", "greater than or equal to 0"),
    (DRY_RUN, "--n-samples-per-prompt 0", "greater than or equal to 1"),
    (DRY_RUN, "--n-samples-per-eval-prompt 0", "greater than or equal to 1"),
    (DRY_RUN, "--rollout-max-response-len 0", "greater than or equal to 1"),
    (DRY_RUN, "--rollout-max-response-len 100000", "leaves no room for a prompt"),
    (DRY_RUN, "--eval-prompt-data aime", "give a name and a path in turn"),
    (DRY_RUN, "--eval-interval 5 --eval-prompt-data []", "--eval-interval needs --eval-prompt-data"),
    (DRY_RUN, "--max-staleness -1", "greater than or equal to 0"),
    (DRY_RUN, "--rm-timeout 0", "greater than 0"),
    (DRY_RUN, "--eps-clip-c 1", "greater than 1"),
    (DRY_RUN, "--kl-loss-type k9", "input should be"),
    (DRY_RUN, "--use-kl-loss --kl-loss-coef 0.1 --kl-loss-type k1", "cannot be trained on"),
    (DRY_RUN, "--num-steps-per-rollout 3", "does not divide"),
    (DRY_RUN, "--over-sampling-batch-size 1", "is less than --rollout-batch-size"),
    (DRY_RUN, "--vllm-kv-cache-dtype fp9", "--vllm-kv-cache-dtype is 'fp9'"),
    (DRY_RUN, "--vllm-all2all-backend deepep_low_latenc", "did you mean deepep_low_latency?"),
    (DRY_RUN, "--vllm-dtype bf16", "--vllm-dtype is 'bf16'"),
    (DRY_RUN, '--vllm-speculative-config {"method":"egale"}', "'method' is 'egale', which vLLM"),
    (DRY_RUN, '--vllm-structured-outputs-config {"backend":"x"}', "'backend' is 'x'"),
    (DRY_RUN, "--vllm-max-model-len 32k", "--vllm-max-model-len is '32k'"),
    (DRY_RUN, "--vllm-port 80", "the plan decides the ports"),
    (DRY_RUN, "--vllm-max-num-seq 3", "did you mean --vllm-max-num-seqs?"),
    (DRY_RUN, "--vllm-enforce-eager --vllm-max-cudagraph-capture-size 8", "exclude each other"),
    (DRY_RUN, "--sequence-parallel", "needs --tensor-model-parallel-size above 1"),
    (DRY_RUN, "--wandb-mode sometimes", "input should be 'online' or 'offline'"),
]  # fmt: skip
ROWS = [
    (DRY_RUN, "not-json.jsonl", b"question,answer\n1+1?,2\n", "is not JSON"),
    (DRY_RUN, "no-prompt.jsonl", b'{"conversations": []}\n', "prompt"),
    (DRY_RUN, "latin1.jsonl", b'{"prompt": "caf\xe9?", "label": "2"}\n', "is not UTF-8"),
    (DRY_RUN, "empty.jsonl", b"", "it has no rows"),
    (DRY_RUN, "prompts.csv", b"prompt,label\n", "neither JSON lines nor parquet"),
    (DRY_RUN, "no-label.jsonl", b'{"prompt": "1+1?"}\n', "label"),
    (DRY_RUN, "null-label.jsonl", b'{"prompt": "1+1?", "label": null}\n', "label"),
    (DRY_RUN, "messages.jsonl", b'{"prompt": [{"content": "1+1?"}], "label": "2"}\n', "role"),
]


FP8 = "model.layers.0.self_attn.o_proj.weight"
SHARD = "model-00001-of-00002.safetensors"


def tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the folder as a single file with some tensors replaced, added, or (None) left out; `__` is a dot."""
    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    found |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in found.items() if value is not None}, folder / "model.safetensors")


def content(folder: Path, name: str, **changes: Any) -> None:
    """Rewrite a JSON file with some values replaced."""
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def only(folder: Path, name: str) -> None:
    """Leave one file of weights, under this name."""
    (folder / SHARD).rename(folder / name)
    for file in (*folder.glob("model*2-of*"), folder / "model.safetensors.index.json"):
        file.unlink()


def unquantised(folder: Path) -> None:
    """bf16 weights, as a cast leaves them, with the quantization_config of before."""
    tensors(folder)
    found = load_file(folder / "model.safetensors")
    plain = {name: value.to(torch.bfloat16) for name, value in found.items() if not name.endswith("_scale_inv")}
    save_file(plain, folder / "model.safetensors")


def without_tokenizer(folder: Path, name: str = "tokenizer_config.json", **options: Any) -> None:
    """No tokenizer.json; `tokenizer_config.json` holds these options."""
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text(json.dumps(options))


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    content(folder, "tokenizer_config.json", chat_template=text)


NAN = torch.tensor([[float("nan")]])
FOLDERS: list[tuple[str, str, Callable[[Path], object], str]] = [
    (DRY_RUN, "weights in .bin files", lambda f: only(f, "pytorch_model.bin"), "save them in the safetensors format"),
    (DRY_RUN, "weights in GGUF", lambda f: only(f, "model.gguf"), "give the checkpoint in the safetensors format"),
    (DRY_RUN, "shards without an index", lambda f: (f / "model.safetensors.index.json").unlink(),
     "its index is missing"),
    (DRY_RUN, "an adapter", lambda f: only(f, "a.safetensors") or (f / "adapter_config.json").touch(), "an adapter"),
    (DRY_RUN, "names of an adapter", lambda f: tensors(f, base_model__x=NAN), "a name of an adapter"),
    (DRY_RUN, "fused experts", lambda f: tensors(f, model__layers__1__mlp__experts__gate_up_proj=NAN), "experts fused"),
    (DRY_RUN, "an unknown architecture", lambda f: content(f, "config.json", architectures=["Some"]), "does not know"),
    (DRY_RUN, "another quantisation", lambda f: content(f, "config.json", quantization_config={"quant_method": "awq"}),
     "vime reads block fp8"),
    (DRY_RUN, "bf16 with a quantization_config left over", unquantised, "remove quantization_config"),
    (DRY_RUN, "fp8 without quantization_config", lambda f: content(f, "config.json", quantization_config=None),
     "config.json has no quantization_config"),
    (DRY_RUN, "a scale too many", lambda f: tensors(f, model__norm__weight_scale_inv=torch.ones(1, 1)), "not in fp8"),
    (DRY_RUN, "a scale of nothing", lambda f: tensors(f, x_scale_inv=torch.ones(1, 1)), "but no file has x"),
    (DRY_RUN, "a missing scale", lambda f: tensors(f, **{f"{FP8}_scale_inv": None}), f"no file has {FP8}_scale_inv"),
    (DRY_RUN, "a NaN scale", lambda f: tensors(f, **{f"{FP8}_scale_inv": NAN}), "holds NaN or infinity"),
    (DRY_RUN, "a tokenizer that is code", lambda f: without_tokenizer(f, auto_map={"AutoTokenizer": ["own.Own", None]}),
     "give --trust-remote-code"),
    (DRY_RUN, "an unknown tokenizer class", lambda f: without_tokenizer(f, tokenizer_class="TikTokenTokenizer"),
     "tokenizer_class is TikTokenTokenizer"),
    (DRY_RUN, "no tokenizer", without_tokenizer, "has no tokenizer"),
    (REHEARSAL, "a broken tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer can be read"),
    (REHEARSAL, "a template that refuses", lambda f: template(f, "{{ raise_exception('no') }}"), "the chat template"),
    (REHEARSAL, "a template of nothing", lambda f: template(f, "{# nothing #}"), "renders it as empty text"),
]  # fmt: skip
PLUGINS = [
    (DRY_RUN, "a function that is not there", "def other(): ...\n", "defines no score"),
    (DRY_RUN, "a file that is not Python", "def score(:\n", "cannot be read as Python"),
    (REHEARSAL, "a library that is not there", "import no_such_library\ndef score(sample): ...\n", "no_such_library"),
    (REHEARSAL, "a name that is not a function", "score = 1\n", "not a function"),
    (REHEARSAL, "a process that ends", "import os\ndef score(sample): ...\nos._exit(3)\n", "exit code 3"),
]
SERVERS = [(REHEARSAL, "http://127.0.0.1:9/score", "start the server, or correct its address")]
TABLE = (*FLAGS, *ROWS, *FOLDERS, *PLUGINS, *SERVERS)


def planned(base: Path, *flags: str) -> Plan:
    recipe = load_recipe("tiny-deepseek-r1", flags)
    return make_plan(recipe, cluster=load_cluster("local"), base_dir=base, run_dir=base / "run", checks=DRY)


def refusal(stage: str, base: Path, *flags: str) -> str:
    """One line of the stage that refuses; the stages before it do not."""
    if stage == DRY_RUN:
        with pytest.raises(BadInput) as caught:
            planned(base, *flags)
    else:
        plan = planned(base, *flags)
        with pytest.raises(BadInput) as caught:
            list(rehearse(plan))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def words(line: str) -> list[str]:
    """The words of a line; a JSON value has no blanks."""
    return line.split(" ")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("ready")
    write_deepseek(base)
    return base


@pytest.mark.parametrize(("stage", "line", "said"), FLAGS, ids=[line for _, line, _ in FLAGS])
def test_a_wrong_option_is_refused(base_dir: Path, stage: str, line: str, said: str) -> None:
    assert said in refusal(stage, base_dir, *words(line))


@pytest.mark.parametrize(("stage", "name", "content", "said"), ROWS, ids=[name for _, name, _, _ in ROWS])
def test_unusable_prompts_are_refused(base_dir: Path, stage: str, name: str, content: bytes, said: str) -> None:
    (base_dir / name).write_bytes(content)
    assert said in refusal(stage, base_dir, "--prompt-data", str(base_dir / name))


@pytest.mark.parametrize(("stage", "what", "spoil", "said"), FOLDERS, ids=[what for _, what, _, _ in FOLDERS])
def test_an_unusable_model_folder_is_refused(
    ready: Path, tmp_path: Path, stage: str, what: str, spoil: Callable[[Path], object], said: str
) -> None:
    base = shutil.copytree(ready, tmp_path / "base")
    spoil(base / "tiny-deepseek-r1")
    assert said in refusal(stage, base)


@pytest.mark.parametrize(("stage", "what", "text", "said"), PLUGINS, ids=[what for _, what, _, _ in PLUGINS])
def test_an_unusable_plug_in_is_refused(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, what: str, text: str, said: str
) -> None:
    (tmp_path / "plug_in_of_this_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert said in refusal(stage, ready, "--rm-type", "plug_in_of_this_test:score")


@pytest.mark.parametrize(("stage", "url", "said"), SERVERS)
def test_a_server_that_does_not_answer_is_refused(
    ready: Path, monkeypatch: pytest.MonkeyPatch, stage: str, url: str, said: str
) -> None:
    monkeypatch.setattr("vime.node.rehearsal.SERVER_S", 0.2)
    assert said in refusal(stage, ready, "--rm-type", "remote", "--rm-url", url)


def test_the_table_is_long_and_only_what_a_node_alone_can_tell_waits_for_the_rehearsal() -> None:
    assert len(TABLE) >= 90
    assert sum(row[0] == REHEARSAL for row in TABLE) == 7


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
