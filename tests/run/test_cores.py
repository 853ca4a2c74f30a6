"""How a node's cores are divided between programs of a tool and all else."""

import pytest

from vime.errors import BadInput
from vime.recipe.schema import AgentOptions
from vime.run.cores import divide, set_aside

PYTHON = AgentOptions(environment="tools", tools=["python"])


def test_programs_get_the_last_eighth_of_the_cores():
    cores = divide(PYTHON, range(96))
    assert cores.programs == tuple(range(84, 96))
    assert cores.others == tuple(range(84))


def test_a_small_node_has_none_to_set_aside_so_that_programs_share_all():
    cores = divide(PYTHON, [0, 1, 2, 3])
    assert cores.programs == cores.others == (0, 1, 2, 3)


def test_the_recipe_may_say_how_many():
    assert set_aside(PYTHON.model_copy(update={"tool_cores": 3}), 4) == 3
    assert set_aside(PYTHON.model_copy(update={"tool_cores": 0}), 96) == 0


def test_without_programs_all_cores_are_the_others():
    assert set_aside(AgentOptions(environment="tools", tools=["calculator"], tool_cores=8), 96) == 0
    assert divide(AgentOptions(), [4, 5]).others == (4, 5)


def test_engines_and_trainer_keep_a_core():
    with pytest.raises(BadInput, match="--tool-cores is 4, and a node has 4 cores: leave some to engines and trainer"):
        set_aside(PYTHON.model_copy(update={"tool_cores": 4}), 4)
