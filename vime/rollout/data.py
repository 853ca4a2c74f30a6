"""Prompt sets as token ids, and the order in which training takes them."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Never

from vime.data.files import Row, read_rows
from vime.data.rows import Cells, Columns, characters, read_cells
from vime.errors import BadInput, DataError
from vime.models.folder import check_tokenizer
from vime.samples import Prompt

MOST_CHARACTERS = 2**22
"""Longer prompts are too long for every context, and are not tokenised: that takes gigabytes."""
MOST_TEMPLATE_SECONDS = 5.0
"""Processor time of the chat template for one row."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one set that fit."""

    path: str
    prompts: tuple[Prompt, ...]
    too_long: int = 0
    """Rows left out because their prompt is longer than allowed."""
    name: str = ""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Tokenisation:
    """How rows become token ids."""

    tokenizer: Any
    apply_chat_template: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    """Longer prompts are left out."""


def load_tokenizer(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; code that came with it runs only with `trust_remote_code`."""
    from transformers import AutoTokenizer

    if not Path(checkpoint).is_dir():
        raise BadInput(f"--hf-checkpoint {checkpoint} is not a folder: give the folder of the HF checkpoint")
    check_tokenizer(Path(checkpoint), trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(
            str(checkpoint), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        # The library does not check the types in the files that it reads, and trusted code may miss what it imports.
        raise BadInput(f"no tokenizer can be read from {checkpoint}: {_line(error)}") from error


def load_prompts(path: str | Path, how: Tokenisation, *, columns: Columns | None = None, name: str = "") -> PromptSet:
    """All prompts of a file or folder, tokenised. Raises BadInput that names the first bad row, or an empty set."""
    columns = columns or Columns()
    rows, prompts = 0, []
    for batch in _batches((row, read_cells(row, columns)) for row in read_rows(path)):
        for (_, cells), ids in zip(batch, _token_ids(batch, how), strict=True):
            if ids is not None and (how.max_tokens is None or len(ids) <= how.max_tokens):
                prompts.append(Prompt(rows, cells.prompt, ids, cells.label, cells.metadata))
            rows += 1
    if not prompts:
        why = f"all {rows} prompts are longer than {how.max_tokens} tokens" if rows else "it has no rows"
        raise BadInput(f"prompt set {path} cannot be used: {why}")
    return PromptSet(str(path), tuple(prompts), rows - len(prompts), name)


def first_prompt(path: str | Path, how: Tokenisation, columns: Columns) -> Prompt:
    """The first prompt of a file or folder, tokenised. Raises BadInput if it is bad, far too long, or missing."""
    for row in read_rows(path):
        cells = read_cells(row, columns)
        (ids,) = _token_ids([(row, cells)], how)
        if ids is None:
            raise BadInput(f"{row.where}: the prompt has more than {MOST_CHARACTERS} characters: shorten it")
        return Prompt(0, cells.prompt, ids, cells.label, cells.metadata)
    raise BadInput(f"prompt set {path} cannot be used: it has no rows")


def _batches(rows: Iterable[tuple[Row, Cells]]) -> Iterator[list[tuple[Row, Cells]]]:
    """Rows in lists that bound the memory of their tokenisation."""
    batch: list[tuple[Row, Cells]] = []
    size = 0
    for row, cells in rows:
        batch.append((row, cells))
        size += characters(cells.prompt)
        if len(batch) == _ROWS_AT_ONCE or size > MOST_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _token_ids(batch: list[tuple[Row, Cells]], how: Tokenisation) -> list[list[int] | None]:
    """Token ids of every row; None for a text that is too long to be tokenised at all."""
    texts: list[str] = []
    for row, each in batch:
        if not how.apply_chat_template and not isinstance(each.prompt, str):
            raise BadInput(f"{row.where} has chat messages: give --apply-chat-template")
        if characters(each.prompt) > MOST_CHARACTERS:
            texts.append("")
        else:
            texts.append(_rendered(row, each.prompt, how) if how.apply_chat_template else each.prompt)
    # The template writes the special tokens itself.
    found: list[list[int] | None] = [None] * len(batch)
    short = [place for place, text in enumerate(texts) if text and len(text) <= MOST_CHARACTERS]
    if short:
        encoded = how.tokenizer([texts[place] for place in short], add_special_tokens=not how.apply_chat_template)
        for place, ids in zip(short, encoded["input_ids"], strict=True):
            if not ids:
                raise BadInput(f"{batch[place][0].where}: the prompt has no tokens: there is nothing to answer")
            found[place] = list(ids)
    return found


def _rendered(row: Row, prompt: Any, how: Tokenisation) -> str:
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        with _processor_time(MOST_TEMPLATE_SECONDS):
            text = how.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **how.template_arguments
            )
    except _TimeUp:
        raise BadInput(f"{row.where}: the chat template takes longer than {MOST_TEMPLATE_SECONDS:g} s") from None
    except Exception as error:
        raise BadInput(f"{row.where}: the chat template refuses it: {_line(error)}") from error
    if not text:
        raise BadInput(f"{row.where}: the chat template renders it as empty text: look at the checkpoint's template")
    return text


class _TimeUp(BaseException):
    """Raised by the timer; not an Exception, so that no handler inside the template's engine takes it."""


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raise _TimeUp once the block has taken so much processor time. Signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def time_up(_signal: int, _frame: FrameType | None) -> Never:
        raise _TimeUp

    before = signal.signal(signal.SIGVTALRM, time_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@dataclass
class PromptStream:
    """Endless prompts of a set, epoch by epoch; the order depends on the seed and the epoch alone.

    The state is two numbers, so a resumed run continues with the very next prompt.
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
        return [self.next() for _ in range(count)]

    def next(self) -> Prompt:
        """The next prompt."""
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        prompt = self.data.prompts[self._order[self.position]]
        self.position += 1
        return prompt

    @property
    def epochs(self) -> float:
        """Passes over the set so far."""
        return self.epoch + self.position / len(self.data)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rows": len(self.data), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken. Raises DataError if the prompts are not the same."""
        if state["rows"] != len(self.data) or (self.shuffle and state["seed"] != self.seed):
            raise DataError(
                f"the checkpoint's data cursor is for {state['rows']} prompts with seed {state['seed']}, but "
                f"{self.data.path} has {len(self.data)} with seed {self.seed}: give the same --prompt-data and "
                "--rollout-seed"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.data)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
