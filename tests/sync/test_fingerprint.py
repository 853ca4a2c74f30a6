"""Fingerprints of tensors: equal for equal bytes, different for any that differ, the same on every device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.sync import fingerprint as module
from vime.sync.fingerprint import fingerprint

SIZES = st.integers(0, 300)


def noise(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 7), st.integers(0, 50))
def test_it_depends_on_the_bytes_alone(size, offset, seed):
    data = noise(size, seed)
    moved = torch.cat([noise(offset, 1), data])[offset:]
    assert fingerprint(moved) == fingerprint(data)
    if size % 4 == 0:
        assert fingerprint(data.clone().view(torch.float32)) == fingerprint(data)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.data())
def test_one_bit_changes_it(size, data):
    one = noise(size)
    other = one.clone()
    other[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint(one) != fingerprint(other)


def test_order_length_and_division_count():
    words = noise(64)
    swapped = torch.cat([words[8:16], words[:8], words[16:]])
    assert fingerprint(words) != fingerprint(swapped)
    assert fingerprint(torch.zeros(8, dtype=torch.uint8)) != fingerprint(torch.zeros(16, dtype=torch.uint8))
    assert fingerprint(words[:32], words[32:]) != fingerprint(words)
    assert fingerprint(words, None) == fingerprint(words)


def test_chunks_do_not_show(monkeypatch):
    whole = fingerprint(noise(1000))
    monkeypatch.setattr(module, "CHUNK_WORDS", 7)
    assert fingerprint(noise(1000)) == whole


@pytest.mark.e2e
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [0, 1, 8, 1000, (1 << 26) + 13])
def test_a_gpu_gives_what_a_processor_gives(size):
    assert fingerprint(noise(size).cuda()) == fingerprint(noise(size))
