"""Layer specs: Transformer Engine's if installed, else Megatron's local ones with our attention and norm.

The local spec lacks three things: attention with latent head sizes, packed sequences and context parallelism; an
RMSNorm that supports sequence parallelism; and down-projections of latent attention replicated on every
tensor-parallel rank. Import this module only after `backend.setup()`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from vime.megatron.attention_layout import AttentionGroup, attention_groups


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked so that Megatron sums its gradient over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _GatherContext(torch.autograd.Function):
    """Concatenates all context-parallel ranks' tokens; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = grads[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


class CoreAttention(MegatronModule):
    """Causal attention by torch's SDPA, sequence by sequence, for any head sizes.

    Takes [t, heads, dim] or [t, 1, heads, dim] with `packed_seq_params`, [s, batch, heads, dim] without; returns
    [t, 1, heads x v_dim] or [s, batch, heads x v_dim]. With context parallelism each rank holds the chunks `r` and
    `2 cp - 1 - r` of every sequence, and gathers the keys and values of all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            return self._unpacked(query, key, value)
        query, key, value = (t.squeeze(1) if t.dim() == 4 else t for t in (query, key, value))
        if self.group.size() > 1:
            key, value = (_GatherContext.apply(t, self.group) for t in (key, value))
        groups = attention_groups(packed_seq_params, self.group.rank(), self.group.size())
        return self._packed(query, key, value, groups).reshape(query.size(0), 1, -1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention over query, key and value of shape [batch, heads, length, dim]; causal without a mask."""
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: list[AttentionGroup]
    ) -> torch.Tensor:
        """[t, heads, v_dim]. Sequences of similar length form one batch; padding follows every real token, so that the
        causal mask hides it."""
        outputs = []
        for group in groups:
            q, k, v = (
                tensor[index].transpose(1, 2)
                for tensor, index in ((query, group.queries), (key, group.keys), (value, group.keys))
            )
            outputs.append(self._attend(q, k, v, group.mask).transpose(1, 2)[group.real])
        order = torch.cat([group.queries[group.real] for group in groups])
        # One scatter is enough: every token's output is in exactly one group.
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return torch.cat(outputs)[inverse]

    def _unpacked(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.group.size() > 1:
            raise NotImplementedError("context parallelism takes packed sequences")
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        return self._attend(q, k, v, None).permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


class PolicyModel(GPTModel):
    """GPTModel that returns the policy's logits, [1, t, V / TP], and in training also those of its draft layers.

    Draft layers (multi-token prediction) learn from detached hidden states through a detached embedding and output
    layer, so that none of their gradients reaches the policy. Layer k, from 1, predicts at each position the token
    k + 1 positions later.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draft: list[torch.Tensor] = []

    def take_draft(self) -> list[torch.Tensor]:
        """Logits, [t, V / TP], of each draft layer in the last forward pass; empty without gradients."""
        draft, self._draft = self._draft, []
        return draft

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not kwargs["mtp_in_postprocess"]:
            return super()._postprocess(hidden_states, **kwargs)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=tied)
        if self.training and torch.is_grad_enabled():
            weight = self.output_layer.weight if tied is None else tied
            assert weight is not None
            self._draft = self._predict(hidden_states, weight, kwargs)
        return logits.transpose(0, 1).contiguous()

    def _predict(self, hidden: torch.Tensor, weight: torch.Tensor, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """Logits of every draft layer from the trunk's output, [t / TP, 1, hidden]."""
        names = ("input_ids", "position_ids", "attention_mask", "packed_seq_params")
        names += ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "sequence_len_offset")
        states = self.mtp(
            # A leaf that requires a gradient: recomputation yields no gradients if no input requires one.
            hidden_states=hidden.detach().requires_grad_(),
            embedding=lambda **given: self.embedding(**given).detach(),
            **{name: arguments[name] for name in names},
        )
        layers = torch.chunk(states, 1 + (self.config.mtp_num_layers or 0), dim=0)[1:]
        return [self.output_layer(layer, weight=weight.detach())[0].squeeze(1) for layer in layers]


_REPLACED: dict[Any, Any] = {WrappedTorchNorm: RMSNorm, DotProductAttention: CoreAttention}
_DUPLICATED = ("linear_q_down_proj", "linear_kv_down_proj")


def _completed(spec: Any) -> Any:
    """Copy of a local spec with our modules in place of Megatron's."""
    if isinstance(spec, ModuleSpec):
        return ModuleSpec(module=spec.module, params=spec.params, submodules=_completed(spec.submodules))
    if isinstance(spec, list):
        return [_completed(one) for one in spec]
    if isinstance(spec, type) or spec is None or not dataclasses.is_dataclass(spec):
        return _REPLACED.get(spec, spec) if isinstance(spec, type) else spec
    values = {
        field.name: Linear if field.name in _DUPLICATED else _completed(getattr(spec, field.name))
        for field in dataclasses.fields(spec)
    }
    return type(spec)(**values)


def decoder_spec(config: TransformerConfig, *, transformer_engine: bool) -> Any:
    """Block spec of this pipeline stage's decoder layers."""
    spec = get_gpt_decoder_block_spec(config, transformer_engine, normalization="RMSNorm")
    return spec if transformer_engine else _completed(spec)


def mtp_spec(config: TransformerConfig, decoder: Any, *, transformer_engine: bool) -> Any:
    """Spec of the multi-token-prediction layers; None on a stage without any."""
    if transformer_engine:
        return get_gpt_mtp_block_spec(config, decoder, use_transformer_engine=True)
    return _completed(get_gpt_mtp_block_spec_for_backend(config, decoder, LocalSpecProvider()))
