"""Log-probs and entropy equal those of torch in value and gradient, and need no fp32 copy of the logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import log_prob_cases, patience
from vime.megatron.logprobs import token_log_probs


def plain(logits, targets, temperature):
    log_softmax = (logits.double() / temperature).log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.integers(1, 16), st.sampled_from([0.5, 1.0, 1.7]), st.integers(0, 99))
def test_values_and_gradients_are_those_of_log_softmax(tokens, vocabulary, chunk, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 4
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.randn(2, tokens, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_probs, entropy = token_log_probs(ours, targets, temperature=temperature, with_entropy=True, chunk=chunk)
    expected, expected_entropy = plain(theirs, targets, temperature)
    assert torch.allclose(log_probs.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-5)
    (log_probs * weights[0] + entropy * weights[1]).sum().backward()
    (expected * weights[0] + expected_entropy * weights[1]).sum().backward()
    # Entropy's gradient multiplies by log-probs, which reach -60 here.
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=5e-5)


def test_without_entropy_there_is_none_and_the_gradient_is_the_same():
    logits = torch.randn(6, 9)
    targets = torch.arange(6)
    with_it, without = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_log_probs(with_it, targets, with_entropy=True)[0].sum().backward()
    log_probs, entropy = token_log_probs(without, targets)
    log_probs.sum().backward()
    assert entropy is None
    assert torch.allclose(with_it.grad, without.grad, atol=1e-6)


def test_a_temperature_of_zero_is_an_error():
    with pytest.raises(ValueError, match="temperature 0"):
        token_log_probs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature=0)


MEASURE = """
import resource, torch
from vime.megatron.logprobs import token_log_probs
tokens, vocabulary = 4096, 8192
logits = torch.zeros(tokens, vocabulary, dtype=torch.bfloat16).normal_()
targets = torch.zeros(tokens, dtype=torch.long)
warm = logits[:256].clone().requires_grad_()
token_log_probs(warm, targets[:256], temperature=0.7, with_entropy=True)[0].sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
log_probs, entropy = token_log_probs(logits.requires_grad_(), targets, temperature=0.7, with_entropy=True, chunk=64)
(log_probs - 0.01 * entropy).sum().backward()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / (tokens * vocabulary * 4))
"""


def test_peak_memory_with_temperature_and_entropy_is_the_gradient_and_a_chunk_not_a_fp32_copy_of_the_logits():
    """In fp32 copies of the logits: a plain log_softmax needs 2 and more; the bf16 gradient alone is 0.5."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=patience.PROCESS
    )
    assert float(done.stdout) < 0.7


def test_torchs_operations_give_what_float64_does_on_one_rank_and_on_two():
    log_prob_cases.check_all("cpu", fused=False)


def test_the_kernels_give_it_too_in_tritons_interpreter():
    """In a process of its own: Triton reads the variable when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.log_prob_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_refuse_logits_whose_columns_are_not_adjacent():
    with pytest.raises(ValueError, match="adjacent"):
        token_log_probs(torch.zeros(5, 4).t(), torch.zeros(4, dtype=torch.long), fused=True)


def on_gpu(test):
    return pytest.mark.e2e(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@on_gpu
@pytest.mark.parametrize("fused", [True, False])
def test_a_gpu_gives_it_too(fused):
    log_prob_cases.check_all("cuda", fused=fused)


@on_gpu
def test_offsets_on_a_gpu_pass_the_range_of_32_bits_and_memory_is_one_gradient():
    tokens, vocabulary = 2**13 + 2, 2**18
    logits = torch.zeros(tokens, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-3:].normal_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    few = logits[-3:].double().requires_grad_()
    expected, expected_entropy = plain(few, targets[-3:], 0.7)
    (expected + expected_entropy).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits.requires_grad_()
    log_probs, entropy = token_log_probs(logits, targets, temperature=0.7, with_entropy=True)
    (log_probs + entropy).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.01 * 2 * tokens * vocabulary
    assert torch.allclose(log_probs[-3:].double(), expected, atol=2e-5)
    assert torch.allclose(entropy[-3:].double(), expected_entropy, atol=2e-5)
    assert torch.allclose(logits.grad[-3:].double(), few.grad, rtol=2**-8, atol=1e-9)
