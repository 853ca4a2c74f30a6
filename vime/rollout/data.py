"""Prompt sets: rows of a jsonl or parquet file as token ids, in an order that a run can resume exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vime.errors import BadInput, DataError
from vime.samples import Prompt


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read."""

    prompt: str = "prompt"
    label: str = "label"
    metadata: str = "metadata"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file that fit."""

    path: str
    prompts: tuple[Prompt, ...]
    too_long: int = 0
    """Rows left out because their prompt is longer than allowed."""

    def __len__(self) -> int:
        return len(self.prompts)


def load_tokenizer(checkpoint: str | Path) -> Any:
    """The checkpoint's tokenizer; never runs code that came with it."""
    from transformers import AutoTokenizer

    if not Path(checkpoint).is_dir():
        raise BadInput(f"--hf-checkpoint {checkpoint} is not a folder: give the folder of the HF checkpoint")
    try:
        return AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"no tokenizer can be read from {checkpoint}: {_line(error)}") from error


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    columns: Columns | None = None,
    apply_chat_template: bool = False,
    max_prompt_tokens: int | None = None,
) -> PromptSet:
    """All prompts of a file, tokenised. Raises BadInput that names the first bad line, or a file without prompts."""
    columns = columns or Columns()
    rows = list(_rows(Path(path)))
    prompts = [_cells(path, number, row, columns) for number, row in enumerate(rows)]
    ids = _token_ids(path, [cells[0] for cells in prompts], tokenizer, apply_chat_template)
    fitting = [
        Prompt(number, prompt, token_ids, label, metadata)
        for number, ((prompt, label, metadata), token_ids) in enumerate(zip(prompts, ids, strict=True))
        if max_prompt_tokens is None or len(token_ids) <= max_prompt_tokens
    ]
    if not fitting:
        why = f"all {len(rows)} prompts are longer than {max_prompt_tokens} tokens" if rows else "it has no rows"
        raise BadInput(f"prompt set {path} cannot be used: {why}")
    return PromptSet(str(path), tuple(fitting), len(rows) - len(fitting))


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise BadInput(f"prompt set {path} is neither .jsonl nor .parquet: convert it to one of them")
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_row(path, number, line)
    except FileNotFoundError as error:
        raise BadInput(f"prompt set {path} does not exist: check --prompt-data and --eval-prompt-data") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompt set {path} cannot be read: {_line(error)}") from error


def _json_row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{path} line {number} is not JSON ({error}): mend or remove the line") from error
    if not isinstance(row, dict):
        raise BadInput(f"{path} line {number} is a {type(row).__name__}: every line has to be a JSON object")
    return row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput(f"prompt set {path} needs pyarrow: install it, or convert the file to .jsonl") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except FileNotFoundError as error:
        raise BadInput(f"prompt set {path} does not exist: check --prompt-data and --eval-prompt-data") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"prompt set {path} cannot be read: {_line(error)}") from error


def _cells(path: str | Path, number: int, row: Mapping[str, Any], columns: Columns) -> tuple[Any, Any, dict[str, Any]]:
    prompt = row.get(columns.prompt)
    where = f"{path} row {number + 1}"
    if prompt is None:
        raise BadInput(f"{where} has no {columns.prompt!r} (it has {', '.join(sorted(row))}): set --input-key")
    if isinstance(prompt, list):
        good = all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in prompt
        )
        if not good or not prompt:
            raise BadInput(f"{where}: {columns.prompt!r} has to be chat messages with role and content, or text")
    elif not isinstance(prompt, str):
        raise BadInput(f"{where}: {columns.prompt!r} is a {type(prompt).__name__}: it has to be chat messages or text")
    metadata = row.get(columns.metadata)
    if isinstance(metadata, str):
        metadata = _json_row(Path(path), number + 1, metadata)
    if metadata is not None and not isinstance(metadata, dict):
        raise BadInput(f"{where}: {columns.metadata!r} is a {type(metadata).__name__}: it has to be an object")
    return prompt, row.get(columns.label), dict(metadata or {})


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn


def _token_ids(path: str | Path, prompts: list[Any], tokenizer: Any, apply_chat_template: bool) -> list[list[int]]:
    if not apply_chat_template:
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise BadInput(f"{path} row {number} has chat messages: give --apply-chat-template")
        return [list(ids) for ids in tokenizer(prompts)["input_ids"]] if prompts else []
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = []
    for number, chat in enumerate(chats, 1):
        try:
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise whatever they like; the row's number is what helps
            raise BadInput(f"{path} row {number}: the chat template refuses it: {_line(error)}") from error
    # The template writes the special tokens itself.
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@dataclass
class PromptStream:
    """Endless prompts of a set, epoch by epoch; the order depends on the seed and the epoch alone.

    The state is two numbers, so a resumed run goes on with the very next prompt.
    """

    data: PromptSet
    shuffle: bool
    seed: int
    epoch: int = 0
    position: int = 0
    _order: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._order = self._order_of(self.epoch)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._next() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rows": len(self.data), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises DataError if the prompts are others than then."""
        if state["rows"] != len(self.data) or (self.shuffle and state["seed"] != self.seed):
            raise DataError(
                f"the checkpoint's data cursor is for {state['rows']} prompts with seed {state['seed']}, but "
                f"{self.data.path} has {len(self.data)} with seed {self.seed}: give the same --prompt-data and "
                "--rollout-seed"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self.epoch)

    def _next(self) -> Prompt:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        prompt = self.data.prompts[self._order[self.position]]
        self.position += 1
        return prompt

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.data)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
