"""Plug-ins are looked for where the job's processes will look."""

from __future__ import annotations

from pathlib import Path

from vime.planning.plugins import check_plugins
from vime.recipe.load import change, load_recipe


def test_a_module_in_the_recipes_own_pythonpath_is_found(tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text("def score(sample):\n    return 1.0\n")
    recipe = change(load_recipe("tiny-qwen3"), rollout={"rm_type": "my_rewards:score"})
    assert [note for note in check_plugins(recipe, required=False) if "my_rewards" in note]
    with_path = change(recipe, misc={"env": {"PYTHONPATH": str(tmp_path)}})
    assert not check_plugins(with_path, required=True)
