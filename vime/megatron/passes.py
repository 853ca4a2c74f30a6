"""Packed micro-batches in Megatron's pipeline schedule: log-probs without gradients, optimizer steps with them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vime.megatron import backend
from vime.megatron.microbatch import PackedBatch, Padding, RolloutTokens, make_batch
from vime.megatron.objective import METRICS, Columns, Objective
from vime.megatron.packing import fixed_micro_batches, micro_batches
from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.recipe.schema import PerfOptions
from vime.system.progress import Progress

Around = Callable[[int], contextlib.AbstractContextManager[None]]
"""Maps a micro-batch index to a context for its forward pass."""


@dataclass(frozen=True)
class Packer:
    """Division of samples into micro-batches by the recipe."""

    perf: PerfOptions
    layout: ParallelLayout

    def shares(self, data: RolloutTokens, samples: Sequence[int], tokens_per_gpu: int | None) -> list[list[list[int]]]:
        """`[data-parallel rank][micro-batch][sample]` of these samples; the same on every rank."""
        padding = Padding.of(self.layout)
        trained = set(data.trained)
        chosen = [sample for sample in samples if sample in trained]
        lengths = [padding.padded(len(data.sequences[sample])) for sample in chosen]
        if self.perf.use_dynamic_batch_size:
            assert tokens_per_gpu is not None, "dynamic batches need --max-tokens-per-gpu"
            found = micro_batches(lengths, padding.capacity(self.layout, tokens_per_gpu), self.layout.dp)
        else:
            found = fixed_micro_batches(lengths, self.perf.micro_batch_size, self.layout.dp)
        return [[[chosen[i] for i in members] for members in share] for share in found]


class ModelPasses:
    """Forward and backward passes of one rank. All ranks call the same method with the same arguments."""

    def __init__(
        self,
        chunks: Sequence[Any],
        objective: Objective,
        packer: Packer,
        coords: Coordinates,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or Progress()
        self.chunks, self.objective = list(chunks), objective
        self._packer, self._layout, self._coords = packer, packer.layout, coords
        self._device = backend.setup().device
        self._padding = Padding.of(packer.layout)

    def micro_batches(self, data: RolloutTokens, samples: Sequence[int], tokens_per_gpu: int | None) -> list[list[int]]:
        """Samples of each of this rank's micro-batches."""
        return self._packer.shares(data, samples, tokens_per_gpu)[self._coords.dp]

    def log_probs(
        self,
        data: RolloutTokens,
        tokens_per_gpu: int | None,
        samples: Sequence[int] | None = None,
        around: Around | None = None,
    ) -> torch.Tensor:
        """Log-probs of all response tokens, fp32 [response tokens] on the CPU, the same on every rank.

        With `samples` only theirs, and 0 elsewhere. `around` returns a context for a micro-batch's forward pass.
        """
        column = torch.zeros(data.response_tokens, device=self._device)
        batches = self._batches(data, range(len(data.sequences)) if samples is None else samples, tokens_per_gpu)

        def measure(batch: PackedBatch, draft: list[torch.Tensor], output: torch.Tensor) -> Any:
            found = self.objective.log_probs(output[0], batch)
            here = batch.response_index >= 0
            column[batch.response_index[here]] = found[here]
            return output.new_zeros(()), _no_tokens(), {}

        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            self._run(batches, measure, around, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return self._over_all_ranks(column).cpu()

    def gradients(
        self,
        data: RolloutTokens,
        samples: Sequence[int],
        columns: Columns,
        tokens_per_gpu: int | None,
        around: Around | None = None,
    ) -> dict[str, float]:
        """Add the gradients of one global batch to the chunks' buffers, reduced over ranks; returns the `METRICS`."""
        batches = self._batches(data, samples, tokens_per_gpu)
        columns = {name: column.to(self._device) for name, column in columns.items()}
        sums = torch.zeros(len(METRICS), device=self._device)

        def measure(batch: PackedBatch, draft: list[torch.Tensor], output: torch.Tensor) -> Any:
            loss, metrics = self.objective(output[0], batch, columns)
            sums.add_(metrics)
            if draft:
                later = self._later(output[0].detach(), batch.column(columns["weights"]), batch, len(draft))
                draft_loss, metrics = self.objective.draft(draft, *later)
                loss = loss + draft_loss
                sums.add_(metrics)
            # With a token count of 0 Megatron sums gradients over ranks without dividing.
            return loss, _no_tokens(), {}

        self._run(batches, measure, around, forward_only=False)
        return dict(zip(METRICS, self._over_all_ranks(sums).tolist(), strict=True))

    def _batches(self, data: RolloutTokens, samples: Sequence[int], tokens_per_gpu: int | None) -> list[PackedBatch]:
        return [
            make_batch(
                data,
                members,
                self._padding,
                cp_rank=self._coords.cp,
                cp_size=self._layout.cp,
                device=self._device,
            )
            for members in self.micro_batches(data, samples, tokens_per_gpu)
        ]

    def _run(
        self,
        batches: list[PackedBatch],
        measure: Callable[[PackedBatch, list[torch.Tensor], torch.Tensor], Any],
        around: Around | None,
        *,
        forward_only: bool,
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward(iterator: Iterator[tuple[int, PackedBatch]], model: Any) -> tuple[torch.Tensor, Any]:
            number, batch = next(iterator)
            self._progress.mark()
            with around(number) if around else contextlib.nullcontext():
                output = model(batch.tokens, batch.positions, None, packed_seq_params=_packed(batch))
            return output, functools.partial(measure, batch, _unwrapped(model).take_draft())

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(enumerate(batches)),
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.size(1) * self._layout.cp,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    @staticmethod
    def _later(
        logits: torch.Tensor, weights: torch.Tensor, batch: PackedBatch, layers: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per draft layer, the policy's logits, [t, V / TP], and weights, [t], for the tokens that it predicts.

        Each layer shifts them by one more position within the sequence, across the borders of context-parallel chunks;
        at the end of a sequence the weight is 0.
        """
        from megatron.core import parallel_state as ps
        from megatron.core.transformer.multi_token_prediction import roll_tensor

        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        columns = logits.t()
        for _ in range(layers):
            group: Any = ps.get_context_parallel_group()
            rolled = {"cp_group": group, "packed_seq_params": _packed(batch)}
            columns, _ = roll_tensor(columns.contiguous(), **rolled)
            weights, _ = roll_tensor(weights, **rolled)
            found[0].append(columns.t())
            found[1].append(weights)
        return found

    def _over_all_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data- and context-parallel ranks of the last pipeline stage, then broadcast to the other stages."""
        from megatron.core import parallel_state as ps

        dist.all_reduce(values, group=ps.get_data_parallel_group(with_context_parallel=True))
        if self._layout.pp > 1:
            stages: Any = ps.get_pipeline_model_parallel_group()
            dist.broadcast(values, src=ps.get_pipeline_model_parallel_last_rank(), group=stages)
        return values


def _packed(batch: PackedBatch) -> Any:
    """Megatron's description of the sequence boundaries in a micro-batch."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds, longest = batch.bounds, batch.longest
    return PackedSeqParams("thd", bounds, bounds, bounds, bounds, longest, longest)


def _unwrapped(model: Any) -> Any:
    """The model without Megatron's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _no_tokens() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int, device=backend.setup().device)
