"""Optimizers by the tensors that they keep for a parameter: read by the memory plan and by checkpoints.

All states and master weights are fp32. With bf16 training an fp32 master weight belongs to the state.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer of `--optimizer`."""

    name: str
    """Megatron's name for it."""
    states: tuple[str, ...]
    """Its tensors of a parameter's shape, under torch's names, which checkpoints use too."""

    def state_bytes(self, *, bf16: bool) -> int:
        """Bytes a parameter: the states, and the master weight of a bf16 parameter."""
        return 4 * (len(self.states) + bf16)

    def host_bytes(self) -> int:
        """Bytes a parameter of an optimizer on the host: weight, gradient and states."""
        return 4 * (2 + len(self.states))

    def checkpoint_bytes(self, *, bf16: bool) -> int:
        """Bytes a parameter in a checkpoint: the weight and what `state_bytes` counts."""
        return (2 if bf16 else 4) + self.state_bytes(bf16=bf16)

    def step_traffic_bytes(self) -> int:
        """Bytes a parameter that a step moves: weight and states read and written, the gradient read."""
        return 4 * (3 + 2 * len(self.states))


_KINDS: dict[str, OptimizerKind] = {}


def register(kind: OptimizerKind) -> None:
    """Make an optimizer known. Raises ValueError where another one has its name."""
    if _KINDS.setdefault(kind.name, kind) != kind:
        raise ValueError(f"there is another optimizer {kind.name}")


def optimizer_names() -> list[str]:
    """Names that `--optimizer` takes."""
    return sorted(_KINDS)


def optimizer_kind(name: str) -> OptimizerKind:
    """The optimizer of a name. Raises ValueError for an unknown one."""
    if name not in _KINDS:
        raise ValueError(f"give one of {', '.join(optimizer_names())}")
    return _KINDS[name]


register(OptimizerKind("adam", ("exp_avg", "exp_avg_sq")))
