"""Make a tiny checkpoint that can call a tool but seldom does, its tokenizer, and products to learn from.

    python tools/make_tiny_tools.py --output-dir BASE [--seed S]

Writes BASE/tiny-tools (Qwen3's shape, bf16) and BASE/tiny-products/{train,eval}.jsonl. The model is pre-trained on
products of which it gives up two in three with a question mark; for the others it calls the tool that its prompt
names, the calculator or `python`, and says what that answers. So reinforcement learning has one thing to find: that
calling pays. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import make_tiny_checkpoint as tiny
import torch
from torch import Tensor

from vime.errors import BadInput, VimeError
from vime.models.config import ModelConfig

NAME, DATA = "tiny-tools", "tiny-products"


@dataclass(frozen=True)
class Tool:
    """A tool that the model can call: texts around a product in its call, and behind the number in its answer."""

    name: str
    head: str
    tail: str
    behind: str


TOOLS = (
    Tool("calculator", '{"name": "calculator", "arguments": {"expression": "', '"}}', ""),
    Tool("python", '{"name": "python", "arguments": {"code": "print(', ')"}}', "\n"),
)
PIECES = ("<tool_call>", "</tool_call>", *(text for tool in TOOLS for text in (tool.head, tool.tail)))
"""Texts that are one token each: a call then has as few tokens as a tiny model can learn."""
WORDS = (*tiny.SPECIAL, "<|tool|>", *tiny.CHARACTERS, '"', "_", *PIECES)
VOCABULARY = 80
END, USER, ASSISTANT, SYSTEM = (WORDS.index(f"<|{name}|>") for name in ("end", "user", "assistant", "system"))
TOOL = WORDS.index("<|tool|>")
CALLED = 0.35
"""Share of the pre-training products that are computed by a tool."""
COPIED = 0.97
"""Probability of a right call, and of a right answer behind it, at which pre-training ends."""
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = tiny.CONFIGS["qwen3"] | {"vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Settings:
    """Inputs that decide the files; written beside them."""

    seed: int
    max_steps: int


@dataclass(frozen=True)
class Product:
    """A product of two numbers. All products have three digits, so that every place is at a fixed distance."""

    a: int
    b: int

    @property
    def question(self) -> str:
        return f"{self.a}*{self.b}"

    @property
    def answer(self) -> str:
        return str(self.a * self.b)

    def record(self) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": f"{self.question}="}], "label": self.answer}

    def parts(self, tool: Tool, called: bool) -> list[tuple[list[int], bool]]:
        """Token ids of a conversation that offers a tool, part by part, and whether the model says them."""
        prompt = [SYSTEM, *encode(f"{tool.name} "), USER, *encode(f"{self.question}="), ASSISTANT]
        if not called:
            return [(prompt, False), ([*encode("?"), END], True)]
        call = [WORDS.index("<tool_call>"), WORDS.index(tool.head), *encode(self.question), WORDS.index(tool.tail)]
        told = [TOOL, *encode(self.answer + tool.behind), ASSISTANT]
        said = [*encode(self.answer), END]
        return [(prompt, False), ([*call, WORDS.index("</tool_call>"), END], True), (told, False), (said, True)]


def encode(text: str) -> list[int]:
    """One token a character."""
    return [WORDS.index(character) for character in text]


def products(seed: int) -> tuple[list[Product], list[Product]]:
    """All products of 34…99 and 3…9 shuffled: nine tenths to train on, the rest held out."""
    every = [Product(a, b) for a in range(34, 100) for b in range(3, 10)]
    random.Random(seed).shuffle(every)
    cut = len(every) * 9 // 10
    return every[:cut], every[cut:]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of characters and the pieces of a call, with the chat template, in HF's own files."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *(f"<|reserved_{i}|>" for i in range(VOCABULARY - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def batch(chosen: list[tuple[Product, Tool, bool]]) -> tuple[Tensor, Tensor]:
    """Token ids [n, length], padded on the right, and labels with -100 wherever the model does not speak."""
    rows = [product.parts(tool, called) for product, tool, called in chosen]
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids, labels = torch.zeros((len(rows), length), dtype=torch.long), torch.full((len(rows), length), -100)
    for number, row in enumerate(rows):
        place = 0
        for part, said in row:
            ids[number, place : place + len(part)] = torch.tensor(part)
            if said:
                labels[number, place : place + len(part)] = torch.tensor(part)
            place += len(part)
    return ids, labels


@torch.no_grad()
def accuracy(model: Any, held_out: list[Product], tool: Tool) -> tuple[float, float]:
    """Mean probabilities that the model calls, and that a call and the answer behind it are right once it calls."""
    ids, labels = batch([(product, tool, True) for product in held_out])
    log_probs = tiny.token_log_probs(model, ids, labels)
    first = len(held_out[0].parts(tool, True)[0][0]) - 1
    return log_probs[:, first].exp().mean().item(), log_probs[:, first + 1 :].sum(-1).exp().mean().item()


def pretrain(model: Any, train: list[Product], held_out: list[Product], settings: Settings) -> tuple[int, float, float]:
    """Train until held-out products are computed right once the model calls; steps, and `accuracy` at its least."""
    generator = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    started, called, right = time.monotonic(), 0.0, 0.0
    for step in range(1, settings.max_steps + 1):
        chosen = [
            (product, generator.choice(TOOLS), generator.random() < CALLED)
            for product in generator.choices(train, k=128)
        ]
        log_probs = tiny.token_log_probs(model, *batch(chosen))
        loss = -log_probs.sum() / (log_probs != 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            called, right = map(min, zip(*(accuracy(model, held_out, tool) for tool in TOOLS), strict=True))
            if step % 50 == 0 or right >= COPIED:
                seconds = time.monotonic() - started
                print(f"step {step}: calls {called:.1%}, then right {right:.1%}, {seconds:.0f} s", flush=True)
            if right >= COPIED:
                return step, called, right
    raise VimeError(
        f"after {settings.max_steps} steps only {right:.1%} of the calls are right, {COPIED:.0%} are wanted: give more "
        "--max-steps or another --seed"
    )


def make_data(base: Path, seed: int) -> None:
    """tiny-products: the two halves as jsonl."""
    settings = {"seed": seed}
    folder = tiny.fresh_folder(base / DATA, settings)
    if folder is None:
        return
    for name, half in zip(("train", "eval"), products(seed), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(product.record()) + "\n" for product in half))
    tiny.write_json(folder / tiny.STAMP, {"tool": "make_tiny_tools", "settings": settings})
    tiny.publish(folder, base / DATA)


def make_checkpoint(base: Path, settings: Settings) -> None:
    """The checkpoint folder."""
    folder = tiny.fresh_folder(base / NAME, asdict(settings))
    if folder is None:
        return
    parsed = ModelConfig.from_hf(CONFIG)
    train, held_out = products(settings.seed)
    model = tiny.build_model(CONFIG, settings.seed)
    steps, called, right = pretrain(model, train, held_out, settings)
    tiny.save_shards(folder, tiny.stored(parsed, tiny.hf_tensors(model, parsed, settings.seed)))
    save_tokenizer(folder)
    tiny.write_json(folder / "config.json", CONFIG)
    generation = {"eos_token_id": END, "pad_token_id": 0, "do_sample": True, "temperature": 1.0}
    tiny.write_json(folder / "generation_config.json", generation)
    made = {"steps": steps, "calls": called, "right_once_called": right}
    tiny.write_json(folder / tiny.STAMP, {"tool": "make_tiny_tools", "settings": asdict(settings), **made})
    tiny.publish(folder, base / NAME)
    print(f"{base / NAME}: {steps} steps, calls for {called:.1%} of the held-out products")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of models and data ($BASE_DIR)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=3000, help="steps after which pre-training has failed")
    arguments = parser.parse_args()
    # One thread is as fast at this size, and the order of its sums is the same on every machine.
    torch.set_num_threads(1)
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        make_data(arguments.output_dir, arguments.seed)
        make_checkpoint(arguments.output_dir, Settings(arguments.seed, arguments.max_steps))
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return BadInput.cause
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.cause
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
