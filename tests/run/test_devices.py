"""Which GPUs a process of the run sees."""

import pytest

from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.run.devices import device_variables, node_slots


def test_a_nodes_slots_are_those_of_its_ranks_and_engines():
    plan = plan_of("deepseek-r1", nodes=16, cluster="example")
    assert node_slots(plan, 3) == tuple(range(8))


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "0,1"), ("", "0,1"), ("4,6", "4,6"), ("GPU-aa, GPU-bb", "GPU-aa,GPU-bb")]
)
def test_the_callers_choice_of_gpus_is_honoured(visible, expected):
    assert device_variables([0, 1], visible)["CUDA_VISIBLE_DEVICES"] == expected


def test_a_choice_of_too_few_gpus_is_refused():
    with pytest.raises(BadInput, match="takes 2 GPUs, and CUDA_VISIBLE_DEVICES=4 leaves 1"):
        device_variables([1], "4")
