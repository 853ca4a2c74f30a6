"""Samples as the tensors of packed micro-batches, and per-token columns that survive any way of packing them.

The response tokens of a rollout are numbered from 0 to `RolloutTokens.response_tokens`, sample by sample, in order.
Advantages, log-probs and weights are columns, fp32 [response tokens], the same on all ranks; a micro-batch only says
which response token each of its positions predicts. So nothing depends on how samples are packed and dealt out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vime.errors import DataError
from vime.megatron.attention_layout import local_tokens
from vime.recipe.parallel import ParallelLayout


@dataclass(frozen=True)
class RolloutTokens:
    """Prompts and responses of all samples of a rollout."""

    sequences: tuple[np.ndarray, ...]
    """int64 [length] each: the prompt's tokens, then the response's."""
    prompts: tuple[int, ...]
    """Number of tokens of each prompt."""
    starts: tuple[int, ...]
    """Number of each sample's first response token."""
    response_tokens: int
    """Response tokens of all samples."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, longest: int | None = None) -> RolloutTokens:
        """From prompts and responses. Raises DataError for an empty prompt or a sequence beyond `longest` tokens."""
        for number, (prompt, response) in enumerate(pairs):
            if not len(prompt):
                raise DataError(f"sample {number} has an empty prompt, so nothing predicts its first token")
            if longest is not None and len(prompt) + len(response) > longest:
                raise DataError(
                    f"sample {number} has {len(prompt) + len(response)} tokens, more than the model's "
                    f"{longest} positions: lower --rollout-max-response-len or --rollout-max-prompt-len"
                )
        sequences = tuple(np.asarray([*prompt, *response], np.int64) for prompt, response in pairs)
        ends = np.cumsum([0, *(len(response) for _, response in pairs)])
        return cls(sequences, tuple(len(prompt) for prompt, _ in pairs), tuple(ends[:-1].tolist()), int(ends[-1]))

    def response(self, sample: int) -> slice:
        """The response tokens of a sample, in a column."""
        start = self.starts[sample]
        return slice(start, start + len(self.sequences[sample]) - self.prompts[sample])

    def split(self, column: torch.Tensor) -> list[torch.Tensor]:
        """A column, sample by sample."""
        return [column[self.response(sample)] for sample in range(len(self.sequences))]

    @property
    def trained(self) -> list[int]:
        """Samples that have a response; the others have nothing to predict."""
        return [i for i, sequence in enumerate(self.sequences) if len(sequence) > self.prompts[i]]


@dataclass(frozen=True)
class Padding:
    """Units of lengths: of each sequence, 2 CP (zigzag chunks), and of the whole micro-batch, CP x TP (sequence
    parallelism splits a context-parallel rank's tokens once more)."""

    sequence: int = 1
    batch: int = 1

    @classmethod
    def of(cls, layout: ParallelLayout) -> Padding:
        sequence = 2 * layout.cp if layout.cp > 1 else 1
        return cls(sequence, math.lcm(sequence, layout.cp * layout.tp))

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes in a micro-batch."""
        return -(-length // self.sequence) * self.sequence

    def capacity(self, layout: ParallelLayout, tokens_per_gpu: int) -> int:
        """Tokens of a micro-batch: CP x tokens a GPU, rounded down to a multiple of `batch`."""
        return max(self.batch, layout.cp * tokens_per_gpu // self.batch * self.batch)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as a context-parallel rank sees it; t is its number of local tokens, padding included."""

    tokens: torch.Tensor
    """int64 [1, t]."""
    positions: torch.Tensor
    """int64 [1, t]: position inside the sequence."""
    targets: torch.Tensor
    """int64 [t]: the next token; 0 where none is predicted."""
    response_index: torch.Tensor
    """int64 [t]: number of the target among the rollout's response tokens; -1 where it is none."""
    samples: torch.Tensor
    """int64 [t]: number of the sample inside the micro-batch, from 0 to `count`."""
    count: int
    bounds: torch.Tensor
    """int32 [sequences + 1]: where each padded sequence starts in the whole micro-batch; its length last.

    Padding stands at the end of each sequence, where causal attention hides it: it counts as part of it.
    """
    longest: int
    """Tokens of the longest padded sequence."""

    def column(self, column: torch.Tensor) -> torch.Tensor:
        """A column at the targets of this micro-batch, fp32 [t]; 0 where there is none."""
        picked = (
            column.to(self.response_index.device)[self.response_index.clamp(min=0)]
            if column.numel()
            else self.targets.float()
        )
        return torch.where(self.response_index >= 0, picked, torch.zeros_like(picked))


def padded_lengths(data: RolloutTokens, members: Sequence[int], padding: Padding) -> list[int]:
    """Tokens that each sequence of a micro-batch takes, and last the padding that fills it up, if any."""
    lengths = [padding.padded(len(data.sequences[i])) for i in members]
    total = sum(lengths)
    rest = (-total % padding.batch) if total else padding.batch
    # The rest up to a multiple of `batch` is one more sequence; `batch` is a multiple of `sequence`, so it divides.
    return [*lengths, rest] if rest else lengths


def make_batch(
    data: RolloutTokens, members: Sequence[int], padding: Padding, *, cp_rank: int, cp_size: int, device: torch.device
) -> PackedBatch:
    """The micro-batch of these samples, [t] tokens on this context-parallel rank.

    Without samples it is a single padding sequence that predicts nothing, so that all ranks run equally many.
    """
    lengths = padded_lengths(data, members, padding)
    total = sum(lengths)
    # [total] each, whole sequences behind each other, before the split over context-parallel ranks.
    tokens, targets = np.zeros(total, np.int64), np.zeros(total, np.int64)
    response_index, samples = np.full(total, -1, np.int64), np.zeros(total, np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    start = 0
    for number, sample in enumerate(members):
        sequence, prompt = data.sequences[sample], data.prompts[sample]
        end = start + len(sequence)
        tokens[start:end] = sequence
        # The position of the token before it predicts a token: response token j is the target at prompt - 1 + j.
        targets[start : end - 1] = sequence[1:]
        response_index[start + prompt - 1 : end - 1] = data.starts[sample] + np.arange(len(sequence) - prompt)
        samples[start : start + lengths[number]] = number
        start += lengths[number]
    mine = local_tokens(lengths, cp_rank, cp_size)
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    columns = np.stack([tokens, positions, targets, response_index, samples])[:, mine]  # [5, t], one copy to the device
    on_device = torch.from_numpy(columns).to(device)
    return PackedBatch(
        tokens=on_device[0:1],
        positions=on_device[1:2],
        targets=on_device[2],
        response_index=on_device[3],
        samples=on_device[4],
        count=max(len(members), 1),
        bounds=bounds,
        longest=max(lengths),
    )


def optimizer_steps(samples: int, steps: int) -> list[range]:
    """Samples of each optimizer step: consecutive, in equal parts as far as they divide, none empty."""
    steps = max(1, min(steps, samples))
    bounds = [samples * step // steps for step in range(steps + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
