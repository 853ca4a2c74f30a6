"""`python -m vime.fetch` with huggingface_hub's own client against a local server."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.hub_server import Hub, serve
from vime import fetch
from vime.checkpoint import download
from vime.checkpoint.download import Listing, RemoteFile, Source
from vime.errors import BadInput
from vime.recipe import files

SHARD = random.Random(0).randbytes(25 * 2**20)
CHUNK = 10 * 2**20
"""Bytes that the client writes at a time."""
MODEL = {"config.json": b'{"a": 1}', "model-00001-of-00001.safetensors": SHARD, "pytorch_model.bin": b"the same again"}
DATA = {"data/train.jsonl": b"{}\n" * 5000, ".gitattributes": b""}
NAME = "model-00001-of-00001.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.repositories = {"owner/model": dict(MODEL), "datasets/owner/data": dict(DATA)}
    with serve(hub):
        yield hub


@pytest.fixture
def base(tmp_path: Path) -> Path:
    text = "fetch:\n  $BASE_DIR/model: owner/model\n  $BASE_DIR/data: datasets/owner/data\n"
    (tmp_path / "small.yaml").write_text(text)
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


def run(base: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    command = [sys.executable, "-m", "vime.fetch", "--recipe", str(base.parent / "small.yaml"), "--base-dir", str(base)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "BASE_DIR"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(base.parent / "home"), "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [*command, *words], env=env, capture_output=True, text=True, timeout=patience.PROCESS, check=False
    )


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.e2e
def test_brings_everything_once_and_checks_it_without_network(hub: Hub, base: Path) -> None:
    missing = run(base, NOWHERE, "--check")
    assert missing.returncode == 2
    assert "nothing is known of owner/model there: run python -m vime.fetch" in missing.stdout
    done = run(base, hub.url)
    assert done.returncode == 0, done.stderr
    assert "fetch owner/model: 100%" in done.stderr
    assert (base / "model" / NAME).read_bytes() == SHARD
    assert (base / "data" / "data" / "train.jsonl").read_bytes() == DATA["data/train.jsonl"]
    # The same weights in another format are left out.
    assert not (base / "model" / "pytorch_model.bin").exists()
    sent = dict(hub.sent)
    assert run(base, hub.url).returncode == 0
    assert hub.sent == sent
    checked = run(base, NOWHERE, "--check", "--verify", "deep")
    assert checked.returncode == 0
    assert "owner/model is complete, 2 files" in checked.stdout


@pytest.mark.e2e
def test_goes_on_where_it_was_interrupted(hub: Hub, base: Path) -> None:
    hub.cut[NAME] = 2 * CHUNK + 1000
    broken = run(base, hub.url)
    assert broken.returncode == 1
    assert f"cannot fetch {NAME} of owner/model" in broken.stderr
    assert broken.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (base / "model" / NAME).exists()
    told = run(base, NOWHERE, "--check")
    assert told.returncode == 2
    assert f"{base}/model/{NAME} is missing" in told.stdout
    hub.cut.clear()
    hub.sent.clear()
    assert run(base, hub.url).returncode == 0
    assert (base / "model" / NAME).read_bytes() == SHARD
    assert hub.sent[NAME] == len(SHARD) - 2 * CHUNK


@pytest.mark.e2e
def test_what_comes_with_another_hash_is_not_kept(hub: Hub, base: Path) -> None:
    hub.spoilt[NAME] = bytes(len(SHARD))
    spoilt = run(base, hub.url)
    assert spoilt.returncode == 1
    assert f"{NAME} of owner/model arrived with a hash other than" in spoilt.stderr
    assert not (base / "model" / NAME).exists()
    hub.spoilt.clear()
    assert run(base, hub.url).returncode == 0


@pytest.mark.e2e
def test_a_file_that_changed_later_is_named_and_fetched_again(hub: Hub, base: Path) -> None:
    assert run(base, hub.url).returncode == 0
    shard = base / "model" / NAME
    status = shard.stat()
    shard.write_bytes(SHARD[:-1] + b"?")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(base, NOWHERE, "--check").returncode == 0
    deep = run(base, NOWHERE, "--check", "--verify", "deep")
    assert deep.returncode == 2
    assert f"{shard} has another hash" in deep.stdout
    os.truncate(shard, 1000)
    told = run(base, NOWHERE, "--check")
    assert f"{shard} has 1000 bytes instead of {len(SHARD)}" in told.stdout
    assert "1 of 2 files of owner/model to fetch, 0.03 GB" in told.stdout
    assert run(base, hub.url).returncode == 0
    assert shard.read_bytes() == SHARD


@pytest.mark.e2e
def test_an_unknown_repository_and_a_node_without_network(hub: Hub, base: Path) -> None:
    del hub.repositories["datasets/owner/data"]
    unknown = run(base, hub.url)
    assert unknown.returncode == 2
    assert "there is no owner/data (dataset) on http://127.0.0.1" in unknown.stderr
    # Said before anything is fetched.
    assert not (base / "model").exists()
    alone = run(base, NOWHERE)
    assert alone.returncode == 1
    assert "cannot fetch owner/model (model) on http://127.0.0.1:9" in alone.stderr
    assert len(alone.stderr.splitlines()) == 1


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    source = Source(tmp_path / "model", "owner/model")
    listing = Listing(source, "abc", (RemoteFile("a.safetensors", 10**12, "0" * 64),))
    monkeypatch.setattr(download, "list_remote", lambda source: listing)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**11}))
    with pytest.raises(BadInput, match=r"931\.3 GiB will be written: make room"):
        fetch.fetch([source])
    assert list(tmp_path.iterdir()) == []


def test_names_that_lead_out_of_the_folder_are_refused() -> None:
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(BadInput, match="not below its folder"):
            list(download.wanted([RemoteFile(name, 1, "0")]))


@pytest.mark.parametrize("text", ["model", "a/b/c", "/b", "datasets/x"])
def test_a_repository_is_owner_and_name(text: str) -> None:
    with pytest.raises(BadInput, match="owner/name"):
        Source.parse("/folder", text)


@pytest.mark.parametrize("recipe", ["deepseek-r1", "qwen3-4b"])
def test_the_recipes_name_everything_that_they_read(recipe: str) -> None:
    """Every input below $BASE_DIR that no stage makes lies in a folder that is fetched."""
    folders = [str(source.folder) for source in fetch.sources(recipe, "/base")]
    content = files.read(files.find("recipes", recipe))
    reads = [content["hf-checkpoint"], content["prompt-data"], *content["eval-prompt-data"][1::2]]
    for path in (path.replace("$BASE_DIR", "/base") for path in reads):
        assert any(path == folder or path.startswith(f"{folder}/") for folder in folders), path


def test_a_login_node_does_not_pay_for_the_client() -> None:
    code = "import sys, vime.fetch, vime.submit; print({'torch', 'huggingface_hub', 'httpx'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patience.PROCESS, check=True
    )
    assert done.stdout.strip() == "set()"
