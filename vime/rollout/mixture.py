"""The prompts of training: several sets by weight, without settled prompts and as a curriculum has it.

All choices follow from the seed and from what the state holds, so that a resumed run takes the very next prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vime.errors import DataError
from vime.rollout.data import PromptStream
from vime.samples import Prompt

MOST_REWARDS = 8
"""Visits of a prompt whose mean rewards are kept."""
MOST_EPOCHS = 100
"""Passes over a set in which a curriculum takes no prompt, after which it counts as one that never will."""


@dataclass
class PromptHistory:
    """Results of a prompt's earlier visits, as a curriculum's function sees them."""

    set: str
    """Name of the prompt set."""
    number: int
    """Row in the set, from 0."""
    rewards: list[float] = field(default_factory=list)
    """Mean reward of each of the last visits, newest last."""
    skips: int = 0
    """Turns that are still left out because all answers of the last visit were rewarded alike."""


class PromptMixture:
    """Endless prompts of several sets.

    The next prompt comes from the set that is furthest behind its share, so after n prompts every set has given its
    share of n, to within one. Rows of `left_out` are never taken. `skip_settled` is the number of turns that a prompt
    misses after a visit whose rewards were all equal.
    """

    def __init__(
        self,
        streams: Mapping[str, PromptStream],
        weights: Mapping[str, float],
        *,
        skip_settled: int = 0,
        remembers: bool = False,
        left_out: Collection[tuple[str, int]] = (),
    ) -> None:
        self._streams = dict(streams)
        total = sum(weights[name] for name in streams)
        self._shares = {name: weights[name] / total for name in streams}
        self._taken = dict.fromkeys(streams, 0)
        self._skip_settled, self._remembers = skip_settled, remembers or skip_settled > 0
        self._history: dict[tuple[str, int], PromptHistory] = {}
        self._chances: dict[tuple[str, int], float] = {}
        self._never = frozenset(left_out)
        self._skipped = self._left_out = 0

    def __len__(self) -> int:
        """Prompts of all sets."""
        return sum(len(stream.data) for stream in self._streams.values())

    @property
    def names(self) -> list[str]:
        return list(self._streams)

    def prompts(self, name: str) -> tuple[Prompt, ...]:
        """The prompts of a set."""
        return self._streams[name].data.prompts

    def take(self, count: int) -> list[tuple[str, Prompt]]:
        """The next prompts, each with the name of its set. Raises DataError."""
        return [self._next() for _ in range(count)]

    def _next(self) -> tuple[str, Prompt]:
        count = sum(self._taken.values()) + 1
        name = max(self._shares, key=lambda each: self._shares[each] * count - self._taken[each])
        self._taken[name] += 1
        stream = self._streams[name]
        first = stream.epoch
        while True:
            prompt = stream.next()
            if self._is_taken(name, prompt, stream):
                return name, prompt
            if stream.epoch - first > MOST_EPOCHS + self._skip_settled:
                raise DataError(
                    f"--curriculum or left-out.json leaves out every prompt of the set {name}: give some a chance"
                )

    def _is_taken(self, name: str, prompt: Prompt, stream: PromptStream) -> bool:
        key = (name, prompt.number)
        if key in self._never:
            return False
        history = self._history.get(key)
        if history and history.skips:
            history.skips -= 1
            self._skipped += 1
            return False
        if _draw(stream, prompt.number) >= self._chances.get(key, 1.0):
            self._left_out += 1
            return False
        return True

    def record(self, name: str, number: int, rewards: Sequence[float]) -> None:
        """Keep what a visit of a prompt gave, where a curriculum or `skip_settled` needs it."""
        if not self._remembers or not rewards:
            return
        history = self._history.setdefault((name, number), PromptHistory(name, number))
        history.rewards = [*history.rewards, sum(rewards) / len(rewards)][-MOST_REWARDS:]
        if len(set(rewards)) == 1:
            history.skips = self._skip_settled

    def histories(self) -> list[PromptHistory]:
        """The prompts that were visited, in order."""
        return [self._history[key] for key in sorted(self._history)]

    def set_chances(self, chances: Sequence[float]) -> None:
        """Take over a curriculum's chances of `histories()`, each from 0 to 1. Raises DataError."""
        histories = self.histories()
        if len(chances) != len(histories) or not all(0 <= chance <= 1 for chance in chances):
            raise DataError(
                f"--curriculum has to give a number from 0 to 1 for each of {len(histories)} prompts, and gave "
                f"{list(chances)!r:.200}"
            )
        self._chances = {(h.set, h.number): chance for h, chance in zip(histories, chances, strict=True)}

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call, and where the sets are."""
        metrics = {
            "rollout/prompts_too_long": float(sum(stream.data.too_long for stream in self._streams.values())),
            "rollout/epoch": sum(self._shares[name] * stream.epochs for name, stream in self._streams.items()),
        }
        if self._remembers:
            metrics["rollout/prompts_skipped"] = float(self._skipped)
            metrics["rollout/prompts_left_out"] = float(self._left_out)
        if len(self._streams) > 1:
            metrics |= {f"rollout/{name}/epoch": stream.epochs for name, stream in self._streams.items()}
        self._skipped = self._left_out = 0
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Cursors and histories, as plain values."""
        return {
            "sets": {name: stream.state_dict() for name, stream in self._streams.items()},
            "shares": self._shares,
            "taken": self._taken,
            "history": [[h.set, h.number, h.rewards, h.skips] for h in self.histories()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken. Raises DataError if the sets are not the same.

        Other weights of the same sets hold from here on; what was taken before does not count then.
        """
        sets = state.get("sets")
        if sets is None:  # a checkpoint of a version that had one set
            sets = dict.fromkeys(self.names[:1], state)
        if set(sets) != set(self._streams):
            raise DataError(
                f"the checkpoint's data cursor is for the prompt sets {', '.join(sorted(sets))}, but this run has "
                f"{', '.join(sorted(self._streams))}: give the same --prompt-data"
            )
        for name, stream in self._streams.items():
            stream.load_state_dict(sets[name])
        same = state.get("shares", self._shares) == self._shares
        self._taken = {name: int(state.get("taken", {}).get(name, 0)) if same else 0 for name in self._streams}
        self._history = {
            (name, number): PromptHistory(name, number, list(rewards), skips)
            for name, number, rewards, skips in state.get("history", ())
            if self._remembers
        }


def _draw(stream: PromptStream, number: int) -> float:
    """A number below 1 that depends on seed, epoch and row alone."""
    digest = hashlib.blake2b(f"{stream.seed}/{stream.epoch}/{number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56
