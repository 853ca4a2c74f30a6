"""A sweep's file: every combination once, options as flags, and one line for what is wrong."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.errors import BadInput
from vime.planning.sweep import load_sweep

VALUES = st.lists(st.integers(0, 9) | st.sampled_from(["a", "b"]), min_size=1, max_size=3)
GRIDS = st.dictionaries(st.sampled_from(["lr", "eps-clip", "seed"]), VALUES, max_size=3)
LISTS = st.lists(st.dictionaries(st.sampled_from(["kl-coef", "tis-clip"]), st.integers(), min_size=1), max_size=3)


def sweep(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return load_sweep(path)


@settings(deadline=None)
@given(GRIDS, LISTS)
def test_the_number_of_variants_is_the_product_and_names_are_unique(tmp_path_factory, grid, listed):
    content = {"grid": grid, "list": listed}
    if not grid and not listed:
        return
    found = sweep(tmp_path_factory.mktemp("sweep"), content).variants
    assert len(found) == math.prod(len(values) for values in grid.values()) * max(1, len(listed))
    assert len({variant.name for variant in found}) == len(found)
    assert [variant.name for variant in found] == sorted(variant.name for variant in found)


def test_grid_zip_and_list_are_multiplied(tmp_path):
    content = {
        "grid": {"lr": ["1e-6", "2e-6"]},
        "zip": {"seed": [1, 2], "kl-coef": [0, 0.1]},
        "list": [{"tis-clip": 2}],
    }
    found = sweep(tmp_path, content).variants
    assert [variant.label() for variant in found] == [
        "--lr 1e-6 --seed 1 --kl-coef 0 --tis-clip 2",
        "--lr 1e-6 --seed 2 --kl-coef 0.1 --tis-clip 2",
        "--lr 2e-6 --seed 1 --kl-coef 0 --tis-clip 2",
        "--lr 2e-6 --seed 2 --kl-coef 0.1 --tis-clip 2",
    ]


def test_switches_and_several_words(tmp_path):
    found = sweep(tmp_path, {"list": [{"use-tis": True, "mismatch-correction": ["tis", "opsm"]}, {"colocate": False}]})
    assert [variant.flags() for variant in found.variants] == [
        ["--use-tis", "--mismatch-correction", "tis", "opsm"],
        ["--no-colocate"],
    ]


def test_submit_and_flags_are_lines_or_lists(tmp_path):
    found = sweep(tmp_path, {"submit": "--recipe tiny-qwen3 --nodes 1", "flags": ["--seed", 3], "grid": {"lr": [1]}})
    assert found.submit == ("--recipe", "tiny-qwen3", "--nodes", "1")
    assert found.flags == ("--seed", "3")
    assert found.name == "sweep"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [", "cannot read the sweep"),
        ("[]", "holds no keys"),
        ({"grids": {}}, "grids is unknown"),
        ({"name": "x"}, "has no variants"),
        ({"grid": {"lr": 1}}, "lr is 1: give a list"),
        ({"grid": {"lr": []}}, "lr is []: give a list"),
        ({"zip": {"lr": [1, 2], "seed": [1]}}, "different lengths"),
        ({"grid": {"lr": [1]}, "list": [{"lr": 2}]}, "lr stands in two"),
        ({"list": [1]}, "give a list, each entry"),
        ({"grid": {"lr": [1]}, "at-once": 0}, "at-once is 0"),
        ({"grid": {"lr": [1]}, "name": "a/b"}, "name is 'a/b'"),
        ({"grid": {"lr": [1]}, "submit": "--nodes 1 -- --lr 2"}, "submit holds --"),
        ({"grid": {"lr": list(range(40)), "seed": list(range(40))}}, "1600 variants"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, content, says):
    with pytest.raises(BadInput) as caught:
        sweep(tmp_path, content)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
