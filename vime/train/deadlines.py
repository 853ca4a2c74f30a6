"""Deadlines of the phases of training."""

from __future__ import annotations

from dataclasses import dataclass

from vime.planning.stages import DISK_BYTES_PER_S, ENGINES_S
from vime.run.plan import Plan


@dataclass(frozen=True)
class PhaseDeadlines:
    """Seconds after which a phase has failed."""

    placement: float = 120.0
    setup: float = 1800.0
    engine_start: float = ENGINES_S
    train: float = 7200.0
    save: float = 1800.0
    sync: float = 1800.0
    silent: float = 120.0
    """Of a rank that gives no sign of life."""
    stuck: float = 600.0
    """Without progress on any rank."""

    @classmethod
    def of(cls, plan: Plan) -> PhaseDeadlines:
        """Phases that read or write a whole checkpoint also have the time that its bytes take on a slow file system."""
        train = next(stage for stage in plan.stages if stage.name in ("train", "evaluate"))
        size: dict[str, int] = {}
        for artefact in (*train.inputs, *train.outputs):
            size[artefact.kind] = max(size.get(artefact.kind, 0), artefact.bytes or 0)
        trained = max(size.get("torch_dist", 0), size.get("hf", 0))
        served = min((len(engine.nodes) for engine in plan.servers), default=1)
        return cls(
            setup=cls.setup + _disk_seconds(trained, len(plan.nodes)),
            engine_start=cls.engine_start + _disk_seconds(size.get("hf", 0), served),
            save=cls.save + _disk_seconds(size.get("run", 0), len(plan.nodes)),
        )


def _disk_seconds(size: int, nodes: int) -> float:
    return size / (nodes * DISK_BYTES_PER_S)
