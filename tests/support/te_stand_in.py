"""Stand-in for the module states of Transformer Engine on a CPU, where it cannot be installed.

Adds to a model of the local spec the states of Transformer Engine's modules: an empty `_extra_state` of linear layers,
attention and unfused norms, and numbered ones of grouped experts in the sharded state. Real Transformer Engine runs in
tests/megatron/test_transformer_engine.py.
"""

from __future__ import annotations

from typing import Any

import torch

from vime.megatron.layers import CoreAttention, RMSNorm
from vime.models.config import ModelConfig
from vime.models.disk import canonical_key


class WithState:
    """A module whose state must be in what is loaded, and may be empty."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0


class NormWithState(WithState, RMSNorm):
    pass


class AttentionWithState(WithState, CoreAttention):
    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


def add_states(chunks: list[Any], config: ModelConfig) -> int:
    """Give every module of the chunks that Transformer Engine would give a state one; their number. A norm that its
    spec fuses into the next matrix has none."""
    count = 0
    for chunk in chunks:
        for name, module in chunk.named_modules():
            fused = canonical_key(f"{name}.weight", config).endswith(".layer_norm_weight")
            kind = AttentionWithState if isinstance(module, CoreAttention) else NormWithState
            if isinstance(module, CoreAttention) or (type(module) is RMSNorm and not fused):
                module.__class__ = kind
                count += 1
    return count


def numbered(sharded: dict[str, Any], experts: int) -> dict[str, Any]:
    """A sharded state with the numbered states that grouped experts add to theirs."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    found = dict(sharded)
    for name in [name for name in sharded if ".experts." in name and name.endswith("linear_fc1._extra_state")][:1]:
        for number in range(1, experts):
            key = f"{name}{number}"
            found[key] = ShardedObject(key, None, (experts,), (number,), replica_id=(0, 0, 0))
    return found
