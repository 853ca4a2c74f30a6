"""Samples, groups of one prompt's samples, and the rollout that training gets; a sample as plain values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


class Status(enum.StrEnum):
    """How the generation of a sample ended."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Sample:
    """One response to one prompt. The lists `response_ids` to `loss_mask` have one entry per response token."""

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
    response: str = ""
    reward: float | None = None
    status: Status = Status.PENDING

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    def values(self) -> dict[str, Any]:
        """All fields as plain values, which JSON can hold where the data set's own values can."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"status": str(self.status)}

    def response_values(self) -> dict[str, Any]:
        """The fields that generation and scoring set, as plain values."""
        return {name: value for name, value in self.values().items() if name in RESPONSE_FIELDS}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Sample:
        """A sample from `values()`; raises KeyError where a field is missing."""
        sample = cls(*(values[name] for name in PROMPT_FIELDS))
        sample.set_response(values)
        return sample

    def set_response(self, values: Mapping[str, Any]) -> None:
        """Take over the fields of `response_values()`; raises KeyError where one is missing."""
        for name in RESPONSE_FIELDS:
            setattr(self, name, Status(values[name]) if name == "status" else values[name])

    def without_response(self) -> Sample:
        """A new sample of the same number and prompt that is still to be generated."""
        return Sample(*(getattr(self, name) for name in PROMPT_FIELDS))


PROMPT_FIELDS = ("index", "group_index", "prompt", "prompt_ids", "label", "metadata")
"""Fields that a sample has from the start, in the order of the constructor."""
RESPONSE_FIELDS = tuple(each.name for each in fields(Sample) if each.name not in PROMPT_FIELDS)
"""Fields that generation and scoring set."""


@dataclass
class Group:
    """All samples of one prompt; it is filtered, trained on and kept as a whole."""

    index: int
    samples: list[Sample]


@dataclass
class Rollout:
    """The groups that one rollout gives to training, and the sampler's metrics."""

    rollout_id: int
    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)
    """Named as they are logged, `rollout/…` and `perf/…`."""

    @property
    def samples(self) -> list[Sample]:
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
