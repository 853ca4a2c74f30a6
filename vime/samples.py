"""Samples, groups of one prompt's samples, and the rollout that training gets; a sample as plain values."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

UNVERSIONED = -1
"""Weight version of tokens that no synced weights made: given ones, and those of an engine before its first sync."""
MODEL = "model"
"""Role of a turn that was sampled."""


class Status(enum.StrEnum):
    """How the generation of a sample ended."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Turn:
    """A stretch of a response: what the model sampled in one turn, or what it was given before the next."""

    role: str
    """`model`, or the roles of the given messages; `ids` for given token ids."""
    start: int
    """Place of its first token in the response."""
    end: int
    """Place behind its last token."""
    text: str = ""
    finish: str = ""
    """How a sampled turn ended: `stop`, `length`, or empty while it is unfinished."""

    @property
    def sampled(self) -> bool:
        """Whether the model sampled it."""
        return self.role == MODEL


@dataclass
class ToolUse:
    """One call of a tool."""

    name: str
    seconds: float = 0.0
    error: str = ""
    """Kind of its failure, such as `timeout`; empty where it answered."""


@dataclass
class Sample:
    """One response to one prompt. The lists `response_ids` to `teacher_log_probs` have one entry per response token.

    The response of a conversation of many turns holds all that came after the prompt: tokens that the model sampled,
    and tokens that it was given, which have the mask 0, the log-prob 0 and no version. The teacher scores both kinds.
    """

    index: int
    """Number of the sample in the run, unique."""
    group_index: int
    """Number of the group in the run, unique."""
    prompt: Any
    """Chat messages or text, as in the data set."""
    prompt_ids: list[int]
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    response_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """The engine's log-probabilities of the sampled tokens, in nats, at the sampling temperature's logits."""
    weight_versions: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 where the token is trained on."""
    teacher_log_probs: list[float] = field(default_factory=list)
    """The teacher's log-probabilities of the response's tokens, in nats at temperature 1; empty without `--use-opd`,
    and until the response is whole."""
    response: str = ""
    """The answer as text: the model's last turn."""
    reward: float | None = None
    status: Status = Status.PENDING
    turns: list[Turn] = field(default_factory=list)
    """In order, without gaps; empty where the response is one sampled turn."""
    tools: list[ToolUse] = field(default_factory=list)
    environment: dict[str, Any] | None = None
    """State of an aborted conversation's environment, as plain values; None where it has none or cannot tell."""
    branch: int = 0
    """Number of the branch inside its conversation, which all samples of the same index are; 0 is the main one."""
    data_prompt: tuple[Any, list[int]] | None = None
    """Prompt and its token ids in the data set, where the conversation began with others."""
    branches: list[Sample] = field(default_factory=list, metadata={"kept": False})
    """Other lines of a finished conversation, which training gets beside this one with the same reward."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    def values(self) -> dict[str, Any]:
        """All fields but the branches as plain values, which JSON can hold where the data set's own values can."""
        plain = {name: getattr(self, name) for name in (*PROMPT_FIELDS, *RESPONSE_FIELDS)} | {
            "status": str(self.status)
        }
        turns = self.turns if len(self.turns) > 1 else []
        return plain | {"turns": [asdict(turn) for turn in turns], "tools": [asdict(use) for use in self.tools]}

    def response_values(self) -> dict[str, Any]:
        """The fields that generation and scoring set, as plain values."""
        names = {*RESPONSE_FIELDS, *(() if self.data_prompt is None else ("prompt", "prompt_ids"))}
        return {name: value for name, value in self.values().items() if name in names}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Sample:
        """A sample from `values()`; raises KeyError where a field is missing that every version wrote."""
        sample = cls(*(values[name] for name in PROMPT_FIELDS))
        sample.set_response(values)
        return sample

    def set_response(self, values: Mapping[str, Any]) -> None:
        """Take over the fields of `response_values()`; KeyError where one is missing that every version wrote."""
        for name in RESPONSE_FIELDS:
            if name in _LATER_FIELDS and name not in values:
                continue
            setattr(self, name, _READERS[name](values[name]) if name in _READERS else values[name])
        if self.data_prompt is not None:
            self.prompt, self.prompt_ids = values["prompt"], values["prompt_ids"]

    def without_response(self) -> Sample:
        """A new sample of the same number and of the data set's prompt that is still to be generated."""
        fresh = Sample(*(getattr(self, name) for name in PROMPT_FIELDS))
        if self.data_prompt is not None:
            fresh.prompt, fresh.prompt_ids = self.data_prompt
        return fresh

    def restart(self) -> None:
        """Forget the response."""
        self.__dict__.update(self.without_response().__dict__)


PROMPT_FIELDS = ("index", "group_index", "prompt", "prompt_ids", "label", "metadata")
"""Fields that a sample has from the start, in the order of the constructor."""
RESPONSE_FIELDS = tuple(
    each.name for each in fields(Sample) if each.name not in PROMPT_FIELDS and each.metadata.get("kept", True)
)
"""Fields that generation and scoring set, and that a file keeps."""
_LATER_FIELDS = frozenset({"turns", "tools", "environment", "branch", "data_prompt", "teacher_log_probs"})
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "status": Status,
    "turns": lambda turns: [Turn(**turn) for turn in turns],
    "tools": lambda tools: [ToolUse(**use) for use in tools],
    "data_prompt": lambda pair: pair if pair is None else tuple(pair),
}


@dataclass
class Group:
    """All samples of one prompt; it is filtered, trained on and kept as a whole."""

    index: int
    samples: list[Sample]

    def conversations(self) -> list[list[Sample]]:
        """The samples of each conversation, its branches behind its main line."""
        return [list(branches) for _, branches in itertools.groupby(self.samples, key=lambda sample: sample.index)]

    def with_branches(self) -> Group:
        """The group as training gets it: every branch of a conversation is a sample, with the conversation's reward."""
        samples: list[Sample] = []
        for sample in self.samples:
            branches = [replace(branch, reward=sample.reward) for branch in sample.branches]
            samples += [replace(sample, branches=[]) if branches else sample, *branches]
        return Group(self.index, samples)


@dataclass
class Rollout:
    """The groups that one rollout gives to training, and the sampler's metrics."""

    rollout_id: int
    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)
    """Named as they are logged, `rollout/…` and `perf/…`."""
    rows: list[tuple[str, int]] = field(default_factory=list)
    """Prompts of the groups: name of the prompt set, and row in it from 0."""

    @property
    def samples(self) -> list[Sample]:
        """All samples, group by group."""
        return [sample for group in self.groups for sample in group.samples]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt set."""

    number: int
    """Place in the file, from 0."""
    prompt: Any
    """Chat messages or text, as in the file."""
    token_ids: list[int]
    label: Any
    metadata: dict[str, Any]


def new_group(index: int, prompt: Prompt, samples: int) -> Group:
    """A group without responses; its samples have numbers that are unique in the run."""
    return Group(
        index,
        [
            Sample(
                index=index * samples + place,
                group_index=index,
                prompt=prompt.prompt,
                prompt_ids=list(prompt.token_ids),
                label=prompt.label,
                metadata=dict(prompt.metadata),
            )
            for place in range(samples)
        ],
    )
