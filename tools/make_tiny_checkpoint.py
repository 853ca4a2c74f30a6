"""Make what `hf download` would bring: a tiny checkpoint that can add a little, its tokenizer, and sums to learn from.

    python tools/make_tiny_checkpoint.py --output-dir BASE [--seed S] [--family deepseek-v3|qwen3] [--device cpu|gpu]

Writes BASE/tiny-deepseek-r1 (DeepSeek-V3's shape with an MTP layer, block fp8) or BASE/tiny-qwen3 (bf16), and
BASE/tiny-math/{train,eval}.jsonl. The model is pre-trained on sums of which two in five are given up with a question
mark, until it gives the right answer to about two in five, so that reinforcement learning finds both right and wrong
answers. The same seed gives the same files, on processors.

`--device gpu` makes the checkpoint for engines on GPUs: their attention kernels take DeepSeek's own head sizes only,
which cost seven times the time of pre-training on a processor. It is trained on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vime.errors import BadInput, VimeError
from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import HFTensor, Param, Where

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>")
CHARACTERS = "0123456789+-*/=()<>.,:;?!' \n{}\\abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 64
PAD, END, USER, ASSISTANT = range(4)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHARDS = 4
STAMP = "made_by.json"
WINDOW = (0.20, 0.60)
GIVEN_UP = 0.4
"""Share of the pre-training sums whose answer is a question mark: a habit that reinforcement learning unlearns for
every sum at once, held-out ones too, where teaching a tiny model more sums would take it far longer."""
NAMES = {"deepseek-v3": "tiny-deepseek-r1", "qwen3": "tiny-qwen3"}
GPU_SHAPE: dict[str, dict[str, Any]] = {
    # DeepSeek's own head sizes, and projections that block fp8 divides into whole blocks.
    "deepseek-v3": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 256,
    },
    # Smallest head size of the attention kernels.
    "qwen3": {"head_dim": 64},
}
"""Changes of `--device gpu` in a family's configuration."""

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # kv_lora_rank and qk_rope_head_dim are DeepSeek's own: vLLM's attention on CPU takes no others.
    "deepseek-v3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 512,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
    "qwen3": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "use_sliding_window": False,
    },
}


@dataclass(frozen=True)
class Settings:
    """Inputs that decide the files; written beside them."""

    seed: int
    family: str
    target_accuracy: float
    max_steps: int
    given_up: float = GIVEN_UP
    device: str = "cpu"
    """Kind of device that the engines run on: `cpu` or `gpu`."""

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return CONFIGS[self.family] | (GPU_SHAPE[self.family] if self.device == "gpu" else {})


@dataclass(frozen=True)
class Problem:
    """A sum and its answer."""

    question: str
    answer: str

    def record(self) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": self.question}], "label": self.answer}

    def given_up(self) -> Problem:
        """The same sum with a question mark for an answer."""
        return Problem(self.question, "?")

    def ids(self) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, with its chat template, and of the answer with its end."""
        return [USER, *encode(self.question), ASSISTANT], [*encode(self.answer), END]


def encode(text: str) -> list[int]:
    """One token a character."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]


def problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """All sums of 0…19 and 0…9, shuffled: four fifths to train on, the rest held out from training."""
    every = [Problem(f"{a}+{b}=", str(a + b)) for a in range(20) for b in range(10)]
    random.Random(seed).shuffle(every)
    cut = len(every) * 4 // 5
    return every[:cut], every[cut:]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters with the chat template, in HF's own files."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *CHARACTERS]
    words += [f"<|reserved_{i}|>" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def build_model(config: dict[str, Any], seed: int) -> Any:
    """transformers' model of the shape, in fp32, with router biases that matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    given = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    model_type = given.pop("model_type")
    hf_config = AutoConfig.for_model(model_type, **given)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.02)
    return model


def batch(chosen: list[Problem], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [n, length], padded on the right, and labels with -100 wherever nothing is predicted."""
    rows = [problem.ids() for problem in chosen]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, answer) in enumerate(rows):
        row = torch.tensor(prompt + answer)
        ids[i, : len(row)] = row
        labels[i, len(prompt) : len(row)] = row[len(prompt) :]
    return ids.to(device), labels.to(device)


def token_log_probs(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """log p [n, length - 1] of every labelled token, 0 elsewhere. Padding on the right reaches nothing."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(wanted < 0, 0.0)


@torch.no_grad()
def accuracy(model: Any, of: list[Problem]) -> float:
    """Share of right answers sampled at temperature 1: the mean probability of the right one, so without noise."""
    return token_log_probs(model, *batch(of, model.device)).sum(-1).exp().mean().item()


def pretrain(model: Any, everything: list[Problem], held_out: list[Problem], settings: Settings) -> tuple[int, float]:
    """Train on all sums until the held-out ones are answered as often as wanted; (steps, accuracy)."""
    generator = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    started, reached = time.monotonic(), 0.0
    for step in range(1, settings.max_steps + 1):
        chosen = generator.choices(everything, k=128)
        seen = [problem.given_up() if generator.random() < settings.given_up else problem for problem in chosen]
        log_probs = token_log_probs(model, *batch(seen, model.device))
        loss = -log_probs.sum() / (log_probs != 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            reached = accuracy(model, held_out)
            if step % 50 == 0 or reached >= settings.target_accuracy:
                seconds = time.monotonic() - started
                print(f"step {step}: loss {loss.item():.3f}, right {reached:.1%}, {seconds:.0f} s", flush=True)
            if reached >= settings.target_accuracy:
                return step, reached
    raise VimeError(
        f"after {settings.max_steps} steps only {reached:.1%} of the held-out sums are answered, "
        f"{settings.target_accuracy:.0%} are wanted: give more --max-steps or another --seed"
    )


def hf_tensors(model: Any, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The model's weights under the names of published checkpoints, one tensor a matrix; MTP layers are made up."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                for part, matrix in zip(("gate", "up"), both.chunk(2), strict=True):
                    tensors[f"{name.removesuffix('gate_up_proj')}{expert}.{part}_proj.weight"] = matrix
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(value):
                tensors[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = matrix
        else:
            tensors[name] = value
    generator = torch.Generator().manual_seed(seed)
    for param in params_of(config):
        if param.where == Where.MTP:
            for part in param.parts:
                tensors[part.name] = fresh(part, generator)
    return tensors


def fresh(part: HFTensor, generator: torch.Generator) -> Tensor:
    """An untrained tensor: norms are ones, all else is small and random."""
    if part.name.endswith("norm.weight"):
        return torch.ones(part.shape)
    return torch.randn(part.shape, generator=generator) * 0.02


def published_order(param: Param) -> tuple[int, int, int]:
    """Where a parameter stands in a published checkpoint: embedding, layers, MTP layers, norm and head."""
    place = {Where.EMBEDDING: 0, Where.DECODER: 1, Where.MTP: 2, Where.HEAD: 3}[param.where]
    return place, param.layer or 0, -1 if param.expert is None else param.expert


def stored(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the files, in order: fp8 with scales or bf16, copies under their aliases."""
    files: dict[str, Tensor] = {}
    for param in sorted(params_of(config), key=published_order):
        for part in param.parts:
            value = tensors[part.name].detach().contiguous()
            if fp8.is_quantised(part.name, part.quantised, config.quantisation):
                assert config.quantisation is not None
                files[part.name], files[fp8.scale_name(part.name)] = fp8.quantise(
                    value, config.quantisation.block, name=part.name
                )
            else:
                files[part.name] = value.to(torch.float32 if param.fp32 else torch.bfloat16)
            # A tied head is not stored at all; DeepSeek's MTP layer stores its own copies.
            for alias in part.aliases if not config.tie_word_embeddings else ():
                files[alias] = files[part.name].clone()
    return files


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Shard files and their index. A shard ends at its share of the bytes, be it between a weight and its scale."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(SHARDS - 1, written * SHARDS // total)][name] = tensor
        written += tensor.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:06d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        index |= dict.fromkeys(shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def as_engine_sees(config: ModelConfig, model: Any, files: dict[str, Tensor], held_out: list[Problem]) -> float:
    """Held-out accuracy of the stored numbers, after fp8 and bf16."""
    names = [part.name for param in params_of(config) if param.where != Where.MTP for part in param.parts]
    values: dict[str, Tensor] = {}
    for name in names:
        scale = files.get(fp8.scale_name(name))
        block = config.quantisation.block if config.quantisation else (128, 128)
        values[name] = (fp8.dequantise(files[name], scale, block) if scale is not None else files[name]).float()
    state = model.state_dict()
    for name in state:
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat([values[f"{stem}{e}.{part}_proj.weight"] for part in ("gate", "up")])
                    for e in range(len(state[name]))
                ]
            )
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            state[name] = torch.stack([values[f"{stem}{e}.down_proj.weight"] for e in range(len(state[name]))])
        elif name in values:
            state[name] = values[name]
    model.load_state_dict(state)
    return accuracy(model, held_out)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def publish(partial: Path, target: Path) -> None:
    """Put a finished folder in its place; an older one that this tool made gives way."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old)
    else:
        os.rename(partial, target)


def fresh_folder(target: Path, settings: dict[str, Any]) -> Path | None:
    """An empty folder to write into, or None when the target already has these settings."""
    if target.exists():
        stamp = target / STAMP
        if not stamp.is_file():
            raise BadInput(f"{target} exists and was not made by this tool: give another --output-dir or move it away")
        if json.loads(stamp.read_text())["settings"] == settings:
            print(f"{target} is there already, with the same settings")
            return None
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def make_data(base: Path, seed: int) -> None:
    """tiny-math: the two halves of the sums as jsonl."""
    settings = {"seed": seed}
    folder = fresh_folder(base / "tiny-math", settings)
    if folder is None:
        return
    for name, half in zip(("train", "eval"), problems(seed), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(problem.record()) + "\n" for problem in half))
    write_json(folder / STAMP, {"tool": "make_tiny_checkpoint", "settings": settings})
    publish(folder, base / "tiny-math")


def make_checkpoint(base: Path, settings: Settings) -> None:
    """The checkpoint folder of one family."""
    target = base / NAMES[settings.family]
    folder = fresh_folder(target, asdict(settings))
    if folder is None:
        return
    config = settings.config()
    parsed = ModelConfig.from_hf(config)
    train, held_out = problems(settings.seed)
    model = build_model(config, settings.seed)
    if settings.device == "gpu" and torch.cuda.is_available():
        model.to("cuda")
    steps, reached = pretrain(model, train + held_out, held_out, settings)
    model.to("cpu")
    files = stored(parsed, hf_tensors(model, parsed, settings.seed))
    final = as_engine_sees(parsed, model, files, held_out)
    if not WINDOW[0] <= final <= WINDOW[1]:
        raise VimeError(f"the stored model answers {final:.1%} of the held-out sums: give another --seed")
    save_shards(folder, files)
    save_tokenizer(folder)
    write_json(folder / "config.json", config)
    generation = {"eos_token_id": END, "pad_token_id": PAD, "do_sample": True, "temperature": 1.0}
    write_json(folder / "generation_config.json", generation)
    made = {"steps": steps, "accuracy_trained": reached, "accuracy_stored": final}
    write_json(folder / STAMP, {"tool": "make_tiny_checkpoint", "settings": asdict(settings), **made})
    publish(folder, target)
    print(f"{target}: {steps} steps, {final:.1%} of the held-out sums right as stored")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of models and data ($BASE_DIR)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=sorted(NAMES), default="deepseek-v3")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="what the engines will run on")
    parser.add_argument("--target-accuracy", type=float, default=0.42, help="right held-out answers at the end")
    parser.add_argument("--max-steps", type=int, default=3000, help="steps after which pre-training has failed")
    arguments = parser.parse_args()
    # One thread is as fast at this size, and the order of its sums is the same on every machine.
    torch.set_num_threads(1)
    try:
        if not WINDOW[0] < arguments.target_accuracy < WINDOW[1]:
            raise BadInput(
                f"--target-accuracy {arguments.target_accuracy}: give a number between {WINDOW[0]} and {WINDOW[1]}"
            )
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        make_data(arguments.output_dir, arguments.seed)
        make_checkpoint(
            arguments.output_dir,
            Settings(
                arguments.seed,
                arguments.family,
                arguments.target_accuracy,
                arguments.max_steps,
                device=arguments.device,
            ),
        )
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return BadInput.cause
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.cause
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
