"""Cluster profiles: whose file counts, what every option becomes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, stub
from vime.errors import BadInput
from vime.planning.cluster import load_cluster
from vime.recipe.files import data_folder
from vime.run.plan import Cluster
from vime.schedulers.batch_script import sbatch_text

EVERYTHING = """
kind: slurm
base-dir: /shared/models
partition: gpu
account: project
qos: high
constraint: h100&ib
gpus-per-node: 8
gpu-request: gres
gpu-type: h100
cpus-per-node: 96
exclusive: false
mem: 1500G
time-limit-minutes: 600
network-interface: ib0
modules: [cuda]
venv: /shared/envs/vime
setup:
  - ulimit -l unlimited
env: {NCCL_DEBUG: WARN}
extra-sbatch: {reservation: big, mail-type: "END,FAIL", contiguous: true}
"""


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's own folder of profiles."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "vime" / "clusters"
    folder.mkdir(parents=True)
    return folder


def test_every_option_of_a_profile_reaches_the_batch_script(profiles: Path, tmp_path: Path) -> None:
    (profiles / "mine.yaml").write_text(EVERYTHING)
    cluster = load_cluster("mine")
    plan = make_plan(tmp_path / "run", [stub("train", "")], kind="slurm").model_copy(update={"cluster": cluster})
    lines = sbatch_text(plan).splitlines()
    for option in (
        "partition=gpu", "account=project", "qos=high", "constraint='h100&ib'", "gres=gpu:h100:8", "cpus-per-task=96",
        "mem=1500G", "time=600", "reservation=big", "mail-type=END,FAIL", "contiguous",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert not [line for line in lines if "exclusive" in line]
    setup = lines[lines.index("# setup") : lines.index("# command")]
    last = ["source /shared/envs/vime/bin/activate", "ulimit -l unlimited", "export NCCL_DEBUG=WARN"]
    assert 'module load cuda 2>"$words" || failed=1' in setup
    assert [line for line in setup if line][-3:] == last
    assert any(line.startswith("exec /shared/envs/vime/bin/python ") for line in lines)
    assert (cluster.base_dir, cluster.network_interface) == ("/shared/models", "ib0")


def test_a_persons_own_profile_goes_before_one_of_the_same_name(profiles: Path) -> None:
    assert load_cluster("devcluster").partition is None
    (profiles / "devcluster.yaml").write_text("kind: slurm\npartition: own\n")
    assert load_cluster("devcluster").partition == "own"


def test_a_container_is_read_whole(profiles: Path) -> None:
    (profiles / "mine.yaml").write_text(
        "kind: slurm\ncontainer: {runtime: apptainer, image: /i.sif, mounts: '/a:/b', options: [--cleanenv]}\n"
    )
    container = load_cluster("mine").container
    assert container is not None
    assert (container.mounts, container.options, container.python) == (("/a:/b",), ("--cleanenv",), "python3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slurm\ncontainer: {runtime: docker, image: x}\n", "container.runtime is 'docker'"),
        ("kind: slurm\ncontainer: {runtime: pyxis}\n", "container.image"),
        ("kind: slurm\ngpu-request: maybe\n", "gpu-request is 'maybe'"),
        ("kind: slurm\nextra-sbatch: {signal: USR1@9}\n", "extra-sbatch has signal: vime sets it"),
        ("kind: slurm\nextra-sbatch: {--partition: x}\n", "extra-sbatch has --partition: give it as partition"),
        ("kind: slurm\nextra-sbatch: {cpus_per_task: 3}\n", "extra-sbatch has cpus_per_task: give it as cpus-per-node"),
        ("- a\n", "holds a list"),
    ],
)
def test_what_a_profile_cannot_say_is_one_line(profiles: Path, text: str, message: str) -> None:
    (profiles / "mine.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"mine\.yaml") as caught:
        load_cluster("mine")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_names_every_option() -> None:
    text = (data_folder("configs") / "clusters" / "example.yaml").read_text()
    missing = [name for name in Cluster.model_fields if f"{name.replace('_', '-')}:" not in text]
    assert missing == ["name"]
