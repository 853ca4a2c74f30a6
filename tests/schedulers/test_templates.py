"""The scripts of slurm/ ask for what vime.submit asks for: the same options, shape by shape."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support import patience
from vime.planning.build import Checks, make_plan
from vime.recipe.files import data_folder
from vime.recipe.load import load_recipe
from vime.run.plan import Cluster, Plan
from vime.schedulers.batch_script import scripts

OWN = ("job-name", "output")
"""Options that a script submitted by hand has of its own."""
FAKE_SBATCH = """#!/bin/bash
printf '%s\\0' "$@" >> "$RECORD"
echo >> "$RECORD"
echo $((100 + $(wc -l < "$RECORD")))
"""
"""Stands for sbatch where only its command line matters."""


@pytest.fixture
def planned(tmp_path: Path):
    def plan(shape: str) -> Plan:
        return make_plan(
            load_recipe("deepseek-r1"),
            cluster=Cluster(name="slurm", kind="slurm", gpus_per_node=8),
            nodes=16,
            base_dir=tmp_path,
            shape=shape,  # pyright: ignore[reportArgumentType]
            checks=Checks(inputs=False, run_folder=False),
        )

    return plan


def options(lines: list[str]) -> dict[str, str]:
    """Long options with their values, those of `#SBATCH` lines or of a command line."""
    found = {}
    for line in lines:
        if match := re.match(r"(?:#SBATCH )?--([\w-]+)(?:=(.*))?$", line):
            found[match[1]] = match[2] or ""
    return {name: value for name, value in found.items() if name not in OWN}


def check_same(template: dict[str, str], submitted: dict[str, str]) -> None:
    """The same options and values; times of the template are round, so they may be up to a quarter longer."""
    assert {**template, "time": "", "signal": ""} == {**submitted, "time": "", "signal": ""}
    for name in ("time", "signal"):
        kind, own = re.split(r"(?=\b\d+$)", template[name])
        same, least = re.split(r"(?=\b\d+$)", submitted[name])
        assert kind == same
        assert int(least) <= int(own) <= 1.25 * int(least), name


def test_the_template_of_one_job_asks_for_what_submit_asks_for(planned) -> None:
    text = (data_folder("slurm") / "deepseek-r1.sbatch").read_text()
    (script,) = scripts(planned("allocation"))
    check_same(options(text.splitlines()), options(script.text.splitlines()))
    assert text.splitlines()[-1] == 'exec python3 -u -m vime.launch --recipe deepseek-r1 "$@"'


def test_the_template_of_a_chain_asks_for_what_submit_asks_for(planned, tmp_path: Path) -> None:
    template = data_folder("slurm") / "deepseek-r1-chain.sbatch"
    record, fake = tmp_path / "record", tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(FAKE_SBATCH)
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "RECORD": str(record), "VIME_RUN_NAME": "a run"}
    more = ["--base-dir", '/shared/it\'s a "folder"', "--", "--lr", "2e-6"]
    said = subprocess.run(["bash", template, *more], env=env, capture_output=True, text=True, timeout=patience.PROCESS)
    assert said.returncode == 0, said.stderr
    assert said.stdout == "run a run: jobs 101 (convert), 102 (train), 103 (report)\n"
    own = options([line for line in template.read_text().splitlines() if line.startswith("#SBATCH")])
    calls = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
    expected = scripts(planned("chain"))
    assert len(calls) == len(expected)
    for call, script, after in zip(calls, expected, (None, "101", "102"), strict=True):
        place = call.index(str(template.resolve()))
        assert call[place + 1 :] == ["--job", script.link, "a run", *more]
        asked = {**own, **options(call[:place])}
        assert asked.pop("parsable") == ""
        waits = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}
        check_same(asked, {**options(script.text.splitlines()), **waits})


@pytest.mark.parametrize("name", ["deepseek-r1.sbatch", "deepseek-r1-chain.sbatch"])
def test_a_template_runs_vime_batch_with_its_arguments_as_they_are(name: str, tmp_path: Path) -> None:
    """Quoting holds: the interpreter gets every argument whole."""
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    more = ["--base-dir", "a 'b\" $HOME größe"]
    job = ["--job", "train", "a run"] if "chain" in name else []
    done = subprocess.run(
        ["bash", data_folder("slurm") / name, *job, *more],
        env=env,
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
    )
    got = done.stdout.splitlines()
    assert got[:5] == ["-u", "-m", "vime.launch", "--recipe", "deepseek-r1"]
    assert got[-2:] == more
    assert (got[5:-2] == ["--shape", "chain", "--stage", "train", "--run-name", "a run"]) == ("chain" in name)
    assert shlex.split(" ".join(map(shlex.quote, got))) == got
