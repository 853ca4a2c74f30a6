"""What a rollout is made of: samples, groups of one prompt's samples, and the rollout that training gets."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
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
    """One response to one prompt. The four response lists have one entry a response token."""

    index: int
    """Number of the sample in the run, unique."""
    group_index: int
    """Number of the group in the run, unique."""
    prompt: Any
    """As in the data set: chat messages or text."""
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


@dataclass
class Group:
    """All samples of one prompt; it is filtered, trained on and kept as a whole."""

    index: int
    samples: list[Sample]


@dataclass
class Rollout:
    """The groups that one rollout gives to training, with what the sampler counted on the way."""

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
    """As in the file: chat messages or text."""
    token_ids: list[int]
    label: Any
    metadata: dict[str, Any]


def new_group(index: int, prompt: Prompt, samples: int) -> Group:
    """A group without answers; its samples are numbered through the run."""
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
