"""Every command of README and docs runs, every link leads somewhere, and every page that an error names is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vime
from tests.support import hf_configs
from tests.support.docs_commands import KINDS, PAGES, ROOT, Block, blocks, person, run, with_dry_run
from tests.support.floors import FLOOR_OF
from tests.support.plans import plan_of
from tests.support.synthetic import synthetic_run
from vime.errors import BadInput, Cause
from vime.megatron.estimators import ScoredSamples
from vime.megatron.policy_losses import TokenTerms
from vime.models import config as model_config
from vime.observe.outcome import ADVICE
from vime.recipe import optimizers
from vime.recipe.schema import AlgorithmOptions
from vime.run.registry import record_run
from vime.samples import Group, Prompt, Sample, new_group

DOCS = {path.name for path in (ROOT / "docs").glob("*.md")}


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as code forges make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_block_says_what_it_needs():
    assert [str(block) for block in blocks() if block.kind not in KINDS] == []
    assert len(blocks()) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings_that_are_there(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, fragment = target.partition("#")
        linked = page if not path else (page.parent / path).resolve()
        assert linked.exists(), target
        if fragment:
            assert fragment in anchors(linked), target


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert {name for name in DOCS if f"docs/{name}" not in text} == set()


def test_pages_and_headings_that_errors_name_are_there():
    sources = [path.read_text() for path in Path(vime.__file__).parent.rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"docs/([\w-]+\.md)", text)}
    assert named
    assert named <= DOCS
    heads = anchors(ROOT / "docs" / "faults.md")
    assert {cause.name.lower().replace("_", "-") for cause in ADVICE} <= heads


def test_the_table_of_exit_codes_is_the_codes_own():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| .* \| (yes|no) \|$", text, re.MULTILINE)
    assert {(name, int(code), again) for name, code, again in rows} == {
        (cause.name, cause.value, "yes" if cause.requeue_mends else "no") for cause in Cause if cause != Cause.SUCCESS
    }


def test_every_cause_has_advice_and_its_place_on_the_page():
    assert set(ADVICE) == set(Cause) - {Cause.SUCCESS}


def test_the_architecture_shows_every_room_on_its_floor():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| `(\w+)` \| \S", text, re.MULTILINE)
    assert {room: int(floor) for floor, room in rows} == FLOOR_OF


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_are_there(page: Path):
    text = page.read_text()
    for name in set(re.findall(r"`((?:vime|tests|tools|configs|slurm)/[\w./-]+)`", text)):
        assert "NAME" in name or (ROOT / name).exists(), name
    for room in set(re.findall(r"`((?:[a-z]+)/[a-z_]+\.py)`", text)) if page.name == "architecture.md" else ():
        assert (ROOT / "vime" / room).is_file() or (ROOT / room).is_file(), room
    for name in set(re.findall(r"`vime((?:\.\w+)+)`", text)):
        assert name == ".json" or names_something(name.strip(".").split(".")), name


def names_something(parts: list[str]) -> bool:
    """A module of vime, or a name that a module defines."""
    path = ROOT / "vime"
    for number, part in enumerate(parts):
        if (path / f"{part}.py").is_file():
            rest = parts[number + 1 :]
            return not rest or re.search(rf"\b{rest[0]}\b", (path / f"{part}.py").read_text()) is not None
        path /= part
        if not path.is_dir():
            return False
    return True


def test_the_glossary_is_short():
    lines = (ROOT / "docs" / "architecture.md").read_text().partition("## Glossary")[2].splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert 20 < len(rows) <= 40


def examples(page: str) -> dict[str, Any]:
    """Names that the Python blocks of a page define, run one after the other."""
    found: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL):
        exec(code, found)
    return found


def answered(*rewards: float) -> Group:
    group = new_group(0, Prompt(0, "1+1=", [1, 2, 3], "2", {}), len(rewards))
    for sample, reward in zip(group.samples, rewards, strict=True):
        sample.response, sample.response_ids, sample.reward = "= 2", [4, 5], reward
    return group


@pytest.fixture
def extending(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that the page's examples define; what they register is forgotten after the test."""
    for module, table in ((optimizers, "_KINDS"), (model_config, "_FAMILIES")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    return examples("extending.md")


def test_the_example_of_an_estimator_gives_advantages(extending: dict[str, Any]):
    rewards = [torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)]
    samples = ScoredSamples(tuple(rewards), tuple(torch.ones(2) for _ in range(4)))
    found = extending["less_median"](samples, AlgorithmOptions())
    assert [values.tolist() for values in found] == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_the_example_of_a_policy_loss_is_the_policy_gradient(extending: dict[str, Any]):
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = TokenTerms(log_probs, log_probs.detach(), torch.tensor([1.0, -3.0]), torch.ones(2), lambda values: values)
    loss = extending["plain_policy_gradient"](terms, AlgorithmOptions())
    loss.loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.0, 3.0]
    assert not loss.clipped.any()


def test_the_example_of_an_optimizer_is_one_that_can_be_chosen(extending: dict[str, Any]):
    assert extending["register"] is optimizers.register
    assert "lion" in optimizers.optimizer_names()


def test_the_example_of_a_family_reads_its_config(extending: dict[str, Any]):
    hf = {**hf_configs.LLAMA_3_1_8B, "architectures": ["ToyForCausalLM"], "toy_norm": True}
    assert model_config.ModelConfig.from_hf(hf).qk_layernorm


def test_the_example_of_a_scheduler_refuses_a_reserved_machine(extending: dict[str, Any], tmp_path: Path):
    scheduler = extending["Reserved"]()
    plan = plan_of("tiny-qwen3", nodes=1)
    scheduler.note = tmp_path / "reserved"
    scheduler.check(plan)
    scheduler.note.touch()
    with pytest.raises(BadInput, match="is reserved: run elsewhere"):
        scheduler.check(plan)


def test_the_example_of_a_reward_rewards(extending: dict[str, Any]):
    for found in (extending, examples("rewards.md")):
        sample: Sample = answered(0.0).samples[0]
        reward = found["right_and_short"]
        assert reward(sample) == pytest.approx(1 - 0.002)
        sample.response = "3"
        assert reward(sample) == pytest.approx(-0.002)


def test_the_example_of_a_filter_keeps_groups_of_unequal_rewards(extending: dict[str, Any]):
    keep = extending["keep"]
    assert keep(answered(0.0, 1.0))
    assert not keep(answered(1.0, 1.0))


def check(block: Block, text: str, env: dict[str, str]) -> None:
    done = run(text, env)
    assert done.returncode == 0, f"{block}: {text}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.e2e
@pytest.mark.parametrize("block", blocks(""), ids=str)
def test_a_block_of_a_login_node_runs_as_it_stands(block: Block, tmp_path: Path):
    check(block, block.text, person(tmp_path))


@pytest.mark.e2e
@pytest.mark.parametrize("block", blocks("cluster"), ids=str)
def test_a_submission_makes_the_plan_that_it_would_submit(block: Block, tmp_path: Path):
    check(block, "\n".join(map(with_dry_run, block.commands)), person(tmp_path, BASE_DIR=str(tmp_path)))


@pytest.fixture(scope="module")
def after_a_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Somebody whose last run has ended."""
    home = tmp_path_factory.mktemp("person")
    env = person(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", env["XDG_STATE_HOME"])
        record_run(synthetic_run(home, 3))
    return env


@pytest.mark.e2e
@pytest.mark.parametrize("block", blocks("run"), ids=str)
def test_a_block_about_a_run_tells_of_the_last_one(block: Block, after_a_run: dict[str, str]):
    check(block, block.text, after_a_run)


@pytest.mark.e2e
@pytest.mark.parametrize("block", blocks("install"), ids=str)
def test_the_installation_works(block: Block, tmp_path: Path):
    """Into a folder of its own, from what is on this machine; test_packaging.py looks at what is in it."""
    copy = tmp_path / "vime"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for command in block.commands:
        assert command == "pip install ."
        here = f"python -m {command} --no-deps --no-build-isolation --quiet --target {tmp_path / 'site'}"
        check(block, f"cd {copy} && {here}", person(tmp_path))
    assert (tmp_path / "site" / "vime" / "submit.py").is_file()


@pytest.mark.e2e
@pytest.mark.parametrize("block", blocks("network"), ids=str)
def test_what_would_download_is_a_command_that_is_there(block: Block, tmp_path: Path):
    for command in block.commands:
        if not command.startswith("export "):
            module = re.match(r"python -m [\w.]+", command)
            assert module, command
            check(block, f"{module[0]} --help", person(tmp_path))


def test_what_these_tests_do_not_run_is_run_by_others():
    commands = {command for block in blocks("suite") for command in block.commands}
    release = ".venv/bin/python tools/release.py 0.3.0"
    assert commands == {"tools/quickstart.sh", "tools/test.sh", "tools/test.sh --fast", release}
    assert '"tools" / "release.py"' in (ROOT / "tests" / "tools" / "test_release.py").read_text()
    assert 'ROOT / "tools" / "quickstart.sh"' in (ROOT / "tests" / "e2e" / "test_main_job.py").read_text()
