"""Log-probs and entropy equal those of torch in value and gradient, and need no fp32 copy of the logits."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import patience
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
