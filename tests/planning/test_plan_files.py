"""plan.json, binding.json and the registry of runs: private, whole, and clear about what is wrong with them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from vime.errors import BadInput
from vime.planning.build import make_plan
from vime.planning.cluster import load_cluster, parse_minutes
from vime.recipe.load import load_recipe
from vime.run.folder import read_binding, read_plan, write_binding, write_plan
from vime.run.plan import Binding, BoundNode, Plan
from vime.run.registry import find_run, last_run, record_run, registry_path, runs


@pytest.fixture
def plan(base_dir: Path) -> Plan:
    recipe = load_recipe("tiny-deepseek-r1")
    return make_plan(recipe, cluster=load_cluster("local"), base_dir=base_dir, run_name="a run ü'$", nodes=2)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_plan_comes_back_as_it_was_from_a_private_file(plan: Plan):
    path = write_plan(plan)
    assert read_plan(plan.run_dir) == plan
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_a_folder_that_refuses_the_plan_is_named(plan: Plan):
    with pytest.raises(BadInput, match=r"cannot make /proc/vime-run: .* that you may write to"):
        write_plan(plan.model_copy(update={"run_dir": "/proc/vime-run"}))


def test_a_binding_comes_back_and_is_replaced_whole(plan: Plan):
    for restart in range(2):
        binding = Binding(job_id="7", restart=restart, nodes=(BoundNode(index=0, host="n1", address="10.0.0.1"),))
        write_binding(plan.run_dir, binding)
        assert read_binding(plan.run_dir) == binding


def test_a_missing_broken_or_foreign_plan_is_named(plan: Plan, tmp_path: Path):
    with pytest.raises(BadInput, match=r"there is no .*plan\.json: give a run folder"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(BadInput, match=r"plan\.json is not one of this version of vime"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text(plan.model_dump_json().replace('"version":2', '"version":3'))
    with pytest.raises(BadInput, match=r"not one of this version of vime: version"):
        read_plan(tmp_path)
    with pytest.raises(BadInput, match=r"look at vime\.status"):
        read_binding(tmp_path)


def test_the_last_run_and_a_named_one_are_found(plan: Plan, tmp_path: Path):
    with pytest.raises(BadInput, match="no run is recorded"):
        last_run()
    folders = [tmp_path / "x" / name for name in ("one", "two")]
    for folder in folders:
        write_plan(plan.model_copy(update={"run_dir": str(folder), "run_name": folder.name}))
        record_run(folder)
    assert last_run() == folders[1]
    assert find_run("one") == find_run(str(folders[0])) == folders[0]
    assert stat.S_IMODE(registry_path().stat().st_mode) == 0o600
    record_run(folders[0])
    assert last_run() == folders[0]
    assert len(runs()) == 2


def test_runs_that_were_removed_and_lines_that_were_cut_are_passed_over(plan: Plan, tmp_path: Path):
    write_plan(plan)
    record_run(plan.run_dir)
    record_run(tmp_path / "gone")
    with registry_path().open("a") as file:
        file.write('{"run_name": "cu\n')
    assert last_run() == Path(plan.run_dir)
    with pytest.raises(BadInput, match="no run 'gone'"):
        find_run("gone")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("1:30:00", 90), ("2-00", 2880), ("1-12:30", 2190), ("1-00:00:01", 1441), ("30:00", 30)],
)
def test_times_are_read_as_slurm_reads_them(text: str, minutes: int):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "1:2:3:4", "-5"])
def test_times_that_are_none_are_refused(text: str):
    with pytest.raises(BadInput, match="--time is"):
        parse_minutes(text)


def test_a_cluster_profile_with_a_wrong_option_is_named(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("kind: slurm\ngpus-per-nod: 8\n")
    with pytest.raises(BadInput, match=r"mine\.yaml: gpus-per-nod is 8"):
        load_cluster(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text(
        "kind: slurm\ngpus-per-node: 4\nsetup: [module load x]\nextra-sbatch: {nice: 5}\n"
    )
    cluster = load_cluster(str(tmp_path / "mine.yaml"))
    assert (cluster.name, cluster.gpus_per_node, cluster.extra_sbatch) == ("mine", 4, {"nice": 5})


@pytest.mark.parametrize("name", ["local", "devcluster", "example"])
def test_shipped_profiles_load(name: str):
    assert load_cluster(name).name == name
