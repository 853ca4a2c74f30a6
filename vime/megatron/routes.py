"""Routes of tokens to experts, replayed by megatron-core's RouterReplay: those of an earlier pass, or the engines'.

Only the choice of experts is replayed; their probabilities stay those of the pass. Routes that the trainer recorded
belong to its micro-batches: a pass that replays has to see the same ones, and then the routes of a micro-batch never
leave the rank that computed them. Routes of the engines come from a file; each rank takes the layers of its stage and
the tokens that its routers see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vime.errors import DataError, VimeError
from vime.megatron.attention_layout import local_tokens
from vime.megatron.microbatch import Padding, RolloutTokens, padded_lengths
from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.run.routes import RoutesFile

Key = tuple[int, int]
"""Optimizer step of the rollout, and micro-batch of the step."""
Source = Callable[[Key], list[torch.Tensor]]
"""Routes of a micro-batch on this rank: [t, top-k] for each of its layers with experts; -1 where none are known."""


class Routes:
    """The routers of one rank's chunks, and the routes that they replay: [t, top-k] a layer with experts."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        """Raises VimeError where the model was built without routing replay."""
        # Draft layers keep their own routes: they run in training alone, and their choices do not reach the policy.
        found = [
            module
            for chunk in chunks
            for name, module in chunk.named_modules()
            if "mtp." not in name and getattr(module, "router_replay", None) is not None
        ]
        self._routers = [module.router_replay for module in found]
        self.layers = [module.layer_number - 1 for module in found]
        """The model's layer of each router, from 0."""
        self._kept: dict[Key, list[torch.Tensor]] = {}
        self._source: Source | None = None
        self.differing: list[Differing] = []
        """How far the trainer's own choice differs, one a router; empty unless the routes are the engines'."""

    @property
    def bytes(self) -> int:
        """Host memory that recorded routes take."""
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

    def recorded(self, key: Key) -> list[torch.Tensor]:
        """The recorded routes of a micro-batch, [t, top-k] a router."""
        return self._kept[key]

    def take(self, source: Source) -> None:
        """Replay these routes from now on, and count where the trainer's own choice differs, once for each token."""
        self._source = source
        self.differing = [Differing(router) for router in self._routers]

    @contextlib.contextmanager
    def replaying(self, key: Key, *, count: bool = True) -> Iterator[None]:
        """Route the forward pass inside the block by the known routes, and its recomputation in the backward pass
        later. Without `count`, as for a reference model, it does not count where the pass's own choice differs.

        Backward passes have to come in the order of the forward passes, as without interleaved pipeline stages.
        """
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        if self._source is not None:
            kept = self._source(key)
        elif key in self._kept:
            kept = self._kept[key]
        else:
            raise VimeError(f"no routes were recorded of micro-batch {key[1]} of step {key[0]}")
        for router, one in zip(self._routers, kept, strict=True):
            router.set_target_indices(one.long())
        for each in self.differing:
            each.counting = count
        with self._action(RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD):
            yield

    def rewind(self) -> None:
        """End a pass: what follows routes as it likes, until it records or replays. Counting ends with the first."""
        for router in self._routers:
            router.clear_indices()
            router.clear_router_replay_action()
        for one in self.differing:
            one.end()

    def forget(self) -> None:
        """Free the routes of a rollout."""
        self._kept.clear()
        self._source = None
        self.rewind()
        for one in self.differing:
            one.close()
        self.differing = []

    @contextlib.contextmanager
    def _action(self, inside: Any, afterwards: Any = None) -> Iterator[None]:
        for router in self._routers:
            router.set_router_replay_action(inside)
        try:
            yield
        finally:
            for router in self._routers:
                router.set_router_replay_action(afterwards)


class Differing:
    """Counts, in a router's replayed forward passes, the tokens for which it would have chosen another set of experts.

    Also puts experts in place of unknown routes (-1), which padding has and each sample's last token.
    """

    def __init__(self, router: Any) -> None:
        self.counts: torch.Tensor | None = None
        """int64 [2] on the device: tokens with other experts, and tokens with known routes."""
        self.counting = True
        self._router, self._ended = router, False
        router.get_replay_topk = self._replay

    def end(self) -> None:
        """Count no more once something was counted."""
        self._ended = self._ended or self.counts is not None

    def close(self) -> None:
        """Give the router back its own way to choose."""
        del self._router.get_replay_topk

    def _replay(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, own: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        action = self._router.router_replay_action
        if action == RouterReplayAction.REPLAY_FORWARD:
            given = self._router.target_topk_idx.to(scores.device)
        elif action == RouterReplayAction.REPLAY_BACKWARD:
            given = self._router.replay_backward_list.pop(0).to(scores.device)
        else:
            return own(scores, topk, num_groups, group_topk)
        chosen = own(scores, topk, num_groups, group_topk)[1]
        known = given[:, :1] >= 0
        if action == RouterReplayAction.REPLAY_FORWARD and self.counting and not self._ended:
            same = (given.unsqueeze(2) == chosen.unsqueeze(1)).any(2).all(1)
            counts = torch.stack([(known[:, 0] & ~same).sum(), known.sum()])
            self.counts = counts if self.counts is None else self.counts + counts
        # A token without routes goes where this router sends it: nothing learns from what it computes.
        given = torch.where(known, given, chosen)
        return scores.gather(1, given), given


class EngineRoutes:
    """The engines' routes of a rollout, as the routers of one rank see them."""

    def __init__(
        self,
        file: RoutesFile,
        data: RolloutTokens,
        layers: Sequence[int],
        experts: int,
        layout: ParallelLayout,
        coords: Coordinates,
    ) -> None:
        """`layers`: the model's layers of this rank's routers."""
        self._file, self._data, self._layers, self._experts = file, data, list(layers), experts
        self._layout, self._coords, self._padding = layout, coords, Padding.of(layout)

    def of(self, members: Sequence[int]) -> list[torch.Tensor]:
        """int16 [t, top-k] a layer for the micro-batch of these samples; t are the tokens that a router of this rank
        sees, -1 are routes of tokens that have none. Raises DataError for rows that cannot be right."""
        lengths = padded_lengths(self._data, members, self._padding)
        mine = local_tokens(lengths, self._coords.cp, self._layout.cp)
        if self._layout.sequence_parallel and self._layout.tp > 1:
            # Sequence parallelism gives every tensor-parallel rank a run of the context-parallel rank's tokens.
            mine = np.array_split(mine, self._layout.tp)[self._coords.tp]
        found = np.full((len(self._layers), len(mine), self._file.top_k), -1, np.int16)
        start = 0
        for sample, length in zip(members, lengths, strict=False):
            rows = self._file.of(sample)
            at = np.flatnonzero((mine >= start) & (mine < start + rows.shape[1]))
            if rows.shape[1] != len(self._data.sequences[sample]) - 1:
                raise DataError(
                    f"sample {sample} of the rollout has {rows.shape[1]} rows of routes for "
                    f"{len(self._data.sequences[sample])} tokens"
                )
            places = mine[at] - start
            for number, layer in enumerate(self._layers):
                taken = rows[layer, places]
                self._check(taken, sample, layer, places)
                found[number, at] = taken
            start += length
        return list(torch.from_numpy(found))

    def _check(self, rows: np.ndarray, sample: int, layer: int, places: np.ndarray) -> None:
        """Raise DataError for an expert that is not there or twice in a row, as in rows that nobody filled."""
        ordered = np.sort(rows, axis=1)
        wrong = (ordered[:, 1:] == ordered[:, :-1]).any(1) | (ordered[:, -1] >= self._experts)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"sample {sample} of the rollout: the routes of token {int(places[first])} in layer {layer} are "
                f"{rows[first].tolist()}, not {rows.shape[1]} different ones of {self._experts} experts"
            )


def differing_shares(routes: Routes, layers: int, device: torch.device) -> dict[str, float]:
    """`routing/differs`, and `routing/differs/layer_<n>` of each layer with experts: the share of tokens that the
    trainer would have sent to other experts than the engine did. Collective; the same on every rank."""
    counts = torch.zeros(layers, 2, dtype=torch.int64, device=device)
    for layer, one in zip(routes.layers, routes.differing, strict=True):
        if one.counts is not None:
            counts[layer] = one.counts
    # Ranks that see the same tokens count them equally often above and below the line.
    dist.all_reduce(counts)
    each = {f"routing/differs/layer_{n:02d}": a / b for n, (a, b) in enumerate(counts.tolist()) if b}
    different, known = counts.sum(0).tolist()
    return {"routing/differs": different / max(1, known), **each}


def _small(indices: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in 1 byte an index where that holds it."""
    kind = torch.uint8 if int(indices.max()) < 256 else torch.int16
    return indices.detach().to(kind).cpu()
