"""The parallel layout of the trainer: sizes, coordinates of a rank, layers of a pipeline stage. Pure arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vime.errors import BadInput


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands in every parallel dimension (all counted from 0)."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions; the rank order is Megatron's default `tp-cp-ep-dp-pp`.

    Dense parameters are laid out over tp x cp x dp x pp, expert parameters over etp x ep x edp x pp;
    the pipeline dimension is common to both.
    """

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise BadInput(f"parallel size {name} is {getattr(self, name)}: give a whole number of at least 1")
        dense = self.tp * self.cp * self.pp
        if self.world_size % dense:
            raise BadInput(
                f"{self.world_size} ranks cannot hold TP{self.tp} x CP{self.cp} x PP{self.pp} = {dense}: "
                f"give a multiple of {dense} ranks or smaller parallel sizes"
            )
        expert = self.etp * self.ep * self.pp
        if self.world_size % expert:
            raise BadInput(
                f"{self.world_size} ranks cannot hold ETP{self.etp} x EP{self.ep} x PP{self.pp} = {expert}: "
                f"give a multiple of {expert} ranks or a smaller expert parallel size"
            )

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the dense parameters."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel replicas of the expert parameters."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank in Megatron's default order."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}")
        per_stage = self.world_size // self.pp
        pp, inner = divmod(rank, per_stage)
        tp = inner % self.tp
        cp = inner // self.tp % self.cp
        dp = inner // (self.tp * self.cp)
        etp = inner % self.etp
        ep = inner // self.etp % self.ep
        edp = inner // (self.etp * self.ep)
        return Coordinates(rank, tp, cp, dp, pp, ep, etp, edp)

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """Global decoder layers of every pipeline stage; the sizes of the first and the last may be given.

        As in Megatron, given ends are taken off first and the rest is divided evenly.
        """
        first, last = self.first_stage_layers, self.last_stage_layers
        rest = num_layers - (first or 0) - (last or 0)
        middle = self.pp - (first is not None) - (last is not None)
        if middle < 0 or rest < 0 or (middle == 0 and rest) or (middle and rest % middle):
            raise BadInput(
                f"{num_layers} layers do not divide over {self.pp} pipeline stages with first {first} and last {last}: "
                "set --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
            )
        sizes = [rest // middle] * middle if middle else []
        sizes = ([first] if first is not None else []) + sizes + ([last] if last is not None else [])
        if any(size < 1 for size in sizes):
            raise BadInput(f"a pipeline stage of {num_layers} layers over {self.pp} stages is empty: use fewer stages")
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return tuple(range(a, b) for a, b in itertools.pairwise(starts))
