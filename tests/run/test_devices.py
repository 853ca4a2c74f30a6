"""Which GPUs a process of the run sees."""

import pytest

from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.run.devices import device_variables, host_gpus, node_slots

APART = ("--device", "gpu", "--no-colocate", "--rollout-num-gpus", "1")


def test_nodes_of_a_cluster_number_their_own_gpus():
    plan = plan_of("deepseek-r1", nodes=16, cluster="example")
    assert host_gpus(plan, 3, [0, 7]) == (0, 7)
    assert node_slots(plan, 3) == tuple(range(8))


def test_logical_nodes_of_one_machine_take_its_gpus_in_turn():
    plan = plan_of("tiny-deepseek-r1", *APART, nodes=2)
    assert [host_gpus(plan, node.index, node_slots(plan, node.index)) for node in plan.nodes] == [(0,), (1,)]


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("", "1"), ("4,6", "6"), ("GPU-aa, GPU-bb", "GPU-bb")])
def test_the_callers_choice_of_gpus_is_honoured(visible, expected):
    plan = plan_of("tiny-deepseek-r1", *APART, nodes=2)
    assert device_variables(plan, 1, [0], visible)["CUDA_VISIBLE_DEVICES"] == expected


def test_a_choice_of_too_few_gpus_is_refused():
    plan = plan_of("tiny-deepseek-r1", *APART, nodes=2)
    with pytest.raises(BadInput, match="takes 2 GPUs, and CUDA_VISIBLE_DEVICES=4 leaves 1"):
        device_variables(plan, 1, [0], "4")
