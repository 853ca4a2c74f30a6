"""Parts of the trainer leave and come back, and training goes on as if they had stayed. On a processor: gradients."""

import gc
import os

import pytest
import torch

from tests.support import tiny_hf
from tests.support.single import built, one_process
from vime.megatron.optimizer import Optimizer
from vime.megatron.residence import Residence
from vime.recipe.schema import ModelOptions, OptimizerOptions, Recipe

RECIPE = Recipe(name="r", model=ModelOptions(bf16=False), optimizer=OptimizerOptions(lr=1e-2))


def steps(optimizer, between):
    """Two optimizer steps with gradients that depend on the step alone; the weights afterwards."""
    for step in range(2):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for chunk in optimizer.chunks:
            for parameter in chunk.module.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
        between()
    return [parameter.detach().clone() for chunk in optimizer.chunks for parameter in chunk.module.parameters()]


def held(residence):
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in residence._buffers)


def test_what_left_and_came_back_between_two_steps_changes_nothing():
    def trained(leaves):
        optimizer = Optimizer(built(tiny_hf.QWEN3, layout), RECIPE, total_steps=2)
        residence = Residence(optimizer.chunks, optimizer.megatron)

        def between():
            for part in leaves:
                residence.leave(part)
            for part in reversed(leaves):
                residence.come_back(part)

        try:
            return steps(optimizer, between)
        finally:
            optimizer.close()

    with one_process() as layout:
        stayed, went = trained(()), trained(("weights", "gradients"))
    assert all(torch.equal(a, b) for a, b in zip(stayed, went, strict=True))


def test_gradients_that_left_take_no_memory_and_weights_can_still_be_read():
    with one_process() as layout:
        optimizer = Optimizer(built(tiny_hf.QWEN3, layout), RECIPE, total_steps=2)
        residence = Residence(optimizer.chunks, optimizer.megatron)
        before = held(residence)
        residence.leave("gradients")
        residence.leave("gradients")
        assert before > 0
        assert held(residence) == 0
        assert all(torch.isfinite(p).all() for chunk in optimizer.chunks for p in chunk.module.parameters())
        residence.come_back("gradients")
        assert held(residence) == before
        assert not any(p.main_grad.any() for chunk in optimizer.chunks for p in chunk.module.parameters())
        optimizer.close()


def test_an_optimizer_that_is_closed_lets_go_of_its_process_groups():
    def threads():
        with one_process() as layout:
            optimizer = Optimizer(built(tiny_hf.QWEN3, layout), RECIPE, total_steps=1)
            steps(optimizer, lambda: None)
            optimizer.close()
        del optimizer
        gc.collect()
        return len(os.listdir("/proc/self/task"))

    first = threads()
    assert threads() <= first + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_free_memory_of_a_machine_without_a_gpu_is_its_hosts():
    with one_process() as layout:
        optimizer = Optimizer(built(tiny_hf.QWEN3, layout), RECIPE, total_steps=1)
        node, gpu, host = Residence(optimizer.chunks, optimizer.megatron, 3).free_bytes()
        optimizer.close()
    assert (node, gpu) == (3, None)
    assert 10**8 < host < 10**14
