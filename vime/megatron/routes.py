"""Routes of tokens to experts, recorded in one pass and replayed in others, by megatron-core's RouterReplay.

Only the choice of experts is replayed; their probabilities stay those of the pass. A pass that replays has to see the
same micro-batches as the one that recorded: then the routes of a micro-batch never leave the rank that computed them,
whatever tensor, context, expert and pipeline parallelism do with its tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vime.errors import VimeError

Key = tuple[int, int]
"""Optimizer step of the rollout, and micro-batch of the step."""


class Routes:
    """The routes of one rank's chunks, [t, top-k] for each layer with experts, on the host."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        """Raises VimeError where the model was built without routing replay."""
        # Draft layers keep their own routes: they run in training alone, and their choices do not reach the policy.
        self._routers = [
            module.router_replay
            for chunk in chunks
            for name, module in chunk.named_modules()
            if "mtp." not in name and getattr(module, "router_replay", None) is not None
        ]
        self._kept: dict[Key, list[torch.Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Host memory that is taken."""
        return sum(one.numel() * one.element_size() for kept in self._kept.values() for one in kept)

    @contextlib.contextmanager
    def recording(self, key: Key) -> Iterator[None]:
        """Keep the routes of the forward pass inside the block."""
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        with self._action(RouterReplayAction.RECORD):
            yield
        found = [router.get_recorded_indices() for router in self._routers]
        if any(one is None for one in found):
            raise VimeError(f"a layer routed nothing in micro-batch {key[1]} of step {key[0]}: its routes are unknown")
        self._kept[key] = [_small(one) for one in found]
        for router in self._routers:
            router.clear_indices()

    @contextlib.contextmanager
    def replaying(self, key: Key) -> Iterator[None]:
        """Route the forward pass inside the block as recorded, and its recomputation in the backward pass later.

        Backward passes have to come in the order of the forward passes, as without interleaved pipeline stages.
        """
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        if key not in self._kept:
            raise VimeError(f"no routes were recorded of micro-batch {key[1]} of step {key[0]}")
        for router, kept in zip(self._routers, self._kept[key], strict=True):
            router.set_target_indices(kept.long())
        with self._action(RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD):
            yield

    def rewind(self) -> None:
        """End a pass: what follows routes as it likes, until it records or replays."""
        for router in self._routers:
            router.clear_indices()
            router.clear_router_replay_action()

    def forget(self) -> None:
        """Free the routes of a rollout."""
        self._kept.clear()
        self.rewind()

    @contextlib.contextmanager
    def _action(self, inside: Any, afterwards: Any = None) -> Iterator[None]:
        for router in self._routers:
            router.set_router_replay_action(inside)
        try:
            yield
        finally:
            for router in self._routers:
                router.set_router_replay_action(afterwards)


def _small(indices: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in 1 byte an index where that holds it."""
    kind = torch.uint8 if int(indices.max()) < 256 else torch.int16
    return indices.detach().to(kind).cpu()
