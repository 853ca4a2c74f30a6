"""The rank of a process, from torchrun's environment or from Slurm's."""

from __future__ import annotations

import pytest

from vime.checkpoint.ranks import Ranks, from_environment
from vime.errors import BadInput


def test_torchrun_says_it_all():
    environ = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    assert from_environment(environ) == Ranks(3, 8, "10.0.0.1", 12345)


def test_one_process_needs_no_address():
    assert from_environment({}) == Ranks()
    assert from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks()


def test_a_slurm_step_agrees_on_a_port_of_its_job():
    step = {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "77", "MASTER_ADDR": "node0"}
    ranks = [from_environment({**step, "SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert [r.rank for r in ranks] == [0, 1, 2, 3]
    assert {(r.world_size, r.address, r.port) for r in ranks} == {(4, "node0", 20077)}


def test_a_job_script_outside_a_step_is_one_process():
    assert from_environment({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}) == Ranks()


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_what_is_wrong_is_named(environ, told):
    with pytest.raises(BadInput, match=told):
        from_environment(environ)
