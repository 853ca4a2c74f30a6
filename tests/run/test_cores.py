"""How a node's cores are divided between programs of a tool and all else."""

import pytest

from vime.errors import BadInput
from vime.recipe.schema import AgentOptions
from vime.run.cores import divide, programs_at_once, set_aside

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


@pytest.mark.parametrize(
    ("options", "cores", "programs"),
    [
        ({}, 96, 24),  # two for each of the twelve cores that are theirs
        ({"tool_cores": 3}, 96, 6),
        ({"tool_cores": 3}, None, 6),
        ({}, 4, 8),  # too few to set some aside: all are shared
        ({"tool_cores": 0}, 96, 192),
        ({}, None, 4),
        ({"tool_programs": 5}, 96, 5),
        ({"tools": ["calculator"], "tool_programs": 5}, 96, 0),
    ],
)
def test_two_programs_run_at_once_for_each_core_of_theirs_unless_the_recipe_says_how_many(options, cores, programs):
    assert programs_at_once(PYTHON.model_copy(update=options), cores) == programs


def test_programs_that_would_take_all_cores_are_refused():
    with pytest.raises(BadInput, match="--tool-cores is 4, and a node has 4 cores"):
        programs_at_once(PYTHON.model_copy(update={"tool_cores": 4}), 4)
