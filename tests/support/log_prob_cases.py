"""Cases of `token_log_probs` against torch in float64, for its kernels and for its chunks of torch's operations.

    TRITON_INTERPRET=1 python -m tests.support.log_prob_cases

runs the kernels on processors, in Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support import patience
from vime.megatron.logprobs import token_log_probs


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    temperature: float = 1.0
    with_entropy: bool = True
    tokens: int = 6
    vocabulary: int = 3 * 4096 + 78
    """Three blocks of the kernels and a part of one; on two ranks one block and two parts."""
    strided: bool = False
    """Rows lie further apart than they are long."""
    used: str = "both"
    """Results that the loss uses: both, log_probs, entropy, or zero: both, the entropy times 0."""


CASES = (
    Case(temperature=0.7),
    Case(torch.float32, temperature=1.7),
    Case(torch.float16, strided=True),
    Case(torch.float32, strided=True, with_entropy=False),
    Case(with_entropy=False, temperature=0.7),
    Case(torch.float32, used="zero"),
    Case(torch.float32, used="log_probs"),
    Case(torch.float32, used="entropy"),
    Case(torch.float32, tokens=1, vocabulary=2),
    Case(tokens=3, vocabulary=130),
)


def check_all(device: str, fused: bool) -> None:
    """Values and gradients of every case, on one rank and on two."""
    for case in CASES:
        for ranks in (1, 2):
            _check(case, device, fused, ranks)
    _check_a_slice_that_is_masked(device, fused)
    _check_not_a_number(device, fused)


def drawn(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets at both ends of the vocabulary and between, and weights of the two results' sum, [2, T]."""
    draw = torch.Generator().manual_seed(case.tokens)
    space = torch.randn(case.tokens, case.vocabulary + 3 * case.strided, generator=draw) * 4
    targets = torch.randint(case.vocabulary, (case.tokens,), generator=draw)
    targets[0], targets[-1] = 0, case.vocabulary - 1
    weights = torch.randn(2, case.tokens, generator=draw)
    logits = space.to(case.dtype).to(device)[:, : case.vocabulary]
    return logits, targets.to(device), weights.to(device)


def expected(case: Case, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and the gradient to the logits, by torch in float64."""
    exact = logits.double().requires_grad_()
    log_softmax = (exact / case.temperature).log_softmax(-1)
    log_probs = log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    _sum(case, log_probs, entropy if case.with_entropy else None, weights).backward()
    assert exact.grad is not None
    return log_probs, entropy, exact.grad


def _sum(case: Case, log_probs: Tensor, entropy: Tensor | None, weights: Tensor) -> Tensor:
    if entropy is None or case.used == "log_probs":
        return (log_probs * weights[0]).sum()
    if case.used == "entropy":
        return entropy.sum()
    return (log_probs * weights[0] + entropy * (weights[1] * (case.used != "zero"))).sum()


def _check(case: Case, device: str, fused: bool, ranks: int) -> None:
    logits, targets, weights = drawn(case, device)
    wanted, wanted_entropy, wanted_gradient = expected(case, logits, targets, weights)
    slices = [part.detach().requires_grad_() for part in logits.chunk(ranks, dim=1)]
    options = {"temperature": case.temperature, "with_entropy": case.with_entropy, "chunk": 4, "fused": fused}

    def forward(rank: int, group: Any) -> tuple[Tensor, Tensor | None]:
        return token_log_probs(slices[rank], targets, group=group, **options)

    for mine, (log_probs, entropy) in zip(slices, on_ranks(ranks, forward), strict=True):
        assert (log_probs.double() - wanted).abs().max() < 2e-5, case
        assert (entropy is not None) == case.with_entropy, case
        assert entropy is None or (entropy.double() - wanted_entropy).abs().max() < 2e-5, case
        _sum(case, log_probs, entropy, weights).backward()
        assert mine.grad is not None
        assert mine.grad.dtype == case.dtype
    gradient = torch.cat([mine.grad for mine in slices if mine.grad is not None], dim=1).double()
    # Rounded to the logits' type, which the interpreter cuts off instead, and what fp32 loses where log-probs multiply.
    ulps = 1.0 if fused and device == "cpu" else 0.5
    allowed = wanted_gradient.abs() * torch.finfo(case.dtype).eps * ulps * 1.01 + 5e-5
    assert ((gradient - wanted_gradient).abs() <= allowed).all(), case


def _check_a_slice_that_is_masked(device: str, fused: bool) -> None:
    """A rank whose columns are all -inf takes no part in the softmax."""
    logits = torch.cat([torch.randn(3, 40), torch.full((3, 40), -torch.inf)], dim=1).to(device)
    targets = torch.tensor([0, 20, 39], device=device)
    slices = [part.detach().requires_grad_() for part in logits.chunk(2, dim=1)]

    def forward(rank: int, group: Any) -> Tensor:
        return token_log_probs(slices[rank], targets, group=group, fused=fused)[0]

    for mine, log_probs in zip(slices, on_ranks(2, forward), strict=True):
        wanted = logits[:, :40].log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        assert torch.allclose(log_probs, wanted, atol=1e-5)
        log_probs.sum().backward()
        assert mine.grad is not None
        assert mine.grad.isfinite().all()
    assert slices[1].grad is not None
    assert not slices[1].grad.any()


def _check_not_a_number(device: str, fused: bool) -> None:
    """A logit that is NaN or infinite shows in its token's results and in no other's."""
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(3, 50, device=device)
        logits[1, 7] = value
        found = token_log_probs(logits, torch.zeros(3, dtype=torch.long, device=device), with_entropy=True, fused=fused)
        for result in found:
            assert result is not None
            assert result.isnan().tolist() == [False, True, False]


def on_ranks(count: int, work: Callable[[int, Any], Any]) -> list[Any]:
    """Results of `work(rank, group)` of every rank of an emulated tensor-parallel group (None for one rank)."""
    if count == 1:
        return [work(0, None)]
    ranks = _Ranks(count)
    names = ("get_rank", "get_world_size", "all_reduce")
    with mock.patch.multiple(dist, **{name: getattr(ranks, name) for name in names}), ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: ranks.run(rank, work), range(count)))


class _Ranks:
    """All-reduce among threads, each of them a rank. One runs at a time, since Triton's interpreter has one state."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(count)
        self.turn = threading.Lock()
        self.mine = threading.local()

    def run(self, rank: int, work: Callable[[int, Any], Any]) -> Any:
        self.mine.rank = rank
        with self.turn:
            try:
                return work(rank, self)
            except BaseException:
                self.barrier.abort()
                raise

    def get_rank(self, group: Any) -> int:
        return self.mine.rank

    def get_world_size(self, group: Any) -> int:
        return self.count

    def all_reduce(self, values: Tensor, op: Any, group: Any) -> None:
        self.values[self.mine.rank] = values.clone()
        self._meet()
        every = torch.stack([self.values[rank] for rank in range(self.count)])
        values.copy_(every.amax(0) if op == dist.ReduceOp.MAX else every.sum(0))
        self._meet()

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait(patience.PROCESS)
        finally:
            self.turn.acquire()


if __name__ == "__main__":
    check_all("cpu", fused=True)
