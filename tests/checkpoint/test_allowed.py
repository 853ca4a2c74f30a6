"""Limits on what opening a torch_dist folder may do: all that a good one needs, nothing else, whoever wrote it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from vime.checkpoint.allowed import (
    COMMON_NAMES,
    METADATA_NAMES,
    check_common,
    check_training_checkpoint,
    read_common,
    read_metadata,
)
from vime.checkpoint.torch_dist import checkpoint_folder
from vime.errors import BadInput
from vime.run.checkpoints import TRACKER

RAN = "VIME_TEST_RAN"


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def call_by_name(module: str, name: str) -> bytes:
    """A pickle of protocol 0 that calls a function which need not exist here."""
    return f"c{module}\n{name}\n(S'{RAN}'\ntR.".encode()


HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {RAN}")),
    "eval": pickle.dumps(Calls(eval, f"__import__('os').environ.__setitem__({RAN!r}, '1')")),
    "exec by name": call_by_name("builtins", "exec"),
    "putenv": call_by_name("posix", "putenv"),
    "getattr": pickle.dumps(Calls(getattr, "", "join")),
    "getattr of a record": pickle.dumps(Calls(getattr, Metadata, "__init__")),
    "getattr of no member": pickle.dumps(Calls(getattr, WriteItemType, "mro")),
    "import": call_by_name("importlib", "import_module"),
    "torch.load": call_by_name("torch.serialization", "load"),
    "torch hub": call_by_name("torch.hub", "load"),
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x0bhub.os.open\x93.",
    "subclass of an allowed module": call_by_name("torch.distributed.checkpoint.filesystem", "open"),
    "a module that is allowed": call_by_name("pathlib", "os"),
    "partial": call_by_name("functools", "partial"),
    "numpy": call_by_name("numpy.core.multiarray", "_reconstruct"),
    "persistent id": b"Pid\n.",
    "extension registry": b"\x82\x01.",
    "nothing": b"",
    "torn": pickle.dumps({"a": list(range(100))})[:50],
    "a long length": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
    "deep": b"(" * 100_000 + b".",
    "text": b"<html>",
    "another object": pickle.dumps({"a": 1}),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A torch_dist folder as dcp writes it, with plans in its metadata as Megatron's have."""
    folder = tmp_path / "iter_0000003"
    writer = dcp.FileSystemWriter(folder)
    dcp.save({"weight": torch.ones(4, 4), "half": torch.ones(3, dtype=torch.bfloat16)}, storage_writer=writer)
    with open(folder / ".metadata", "rb") as stream:
        metadata = pickle.load(stream)
    metadata.all_local_plans = [SavePlan([])]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"iteration": 3, "checkpoint_version": 3.0, "groups": [{"lr": 0.1}]}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = read_metadata(folder)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_good_folder_is_read(good: Path) -> None:
    assert set(read_metadata(good).state_dict_metadata) == {"weight", "half"}
    check_training_checkpoint(good)


def test_members_of_enumerations_are_read_as_any_python_writes_them(good: Path) -> None:
    class Early(pickle.Pickler):
        """As Python 3.11.0 to 3.11.3, Debian 12's among them: a member is looked up by name."""

        def reducer_override(self, value: Any, /) -> Any:
            return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented

    metadata = read_metadata(good)
    with open(good / ".metadata", "wb") as stream:
        Early(stream).dump(metadata)
    assert b"getattr" in (good / ".metadata").read_bytes()
    assert read_metadata(good) == metadata


def test_a_read_takes_nothing_back_that_megatron_allowed(good: Path) -> None:
    torch.serialization.add_safe_globals([argparse.Namespace])
    read_common(good / "common.pt")
    assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_nothing_is_allowed_beyond_records_types_and_layouts() -> None:
    """Names on the list build plain records; each new one needs a look at what calling it can do."""
    # Unpickling a namespace sets its attributes and calls nothing.
    assert frozenset({("argparse", "Namespace")}) == COMMON_NAMES
    others = {
        (module, name) for module, name in METADATA_NAMES if not isinstance(getattr(torch, name, None), torch.dtype)
    }
    assert {f"{module.removeprefix('torch.distributed.')}.{name}" for module, name in others} == {
        "checkpoint.filesystem._StorageInfo",
        "checkpoint.metadata.BytesStorageMetadata",
        "checkpoint.metadata.ChunkStorageMetadata",
        "checkpoint.metadata.Metadata",
        "checkpoint.metadata.MetadataIndex",
        "checkpoint.metadata.StorageMeta",
        "checkpoint.metadata.TensorProperties",
        "checkpoint.metadata.TensorStorageMetadata",
        "checkpoint.metadata._MEM_FORMAT_ENCODING",
        "checkpoint.planner.SavePlan",
        "checkpoint.planner.TensorWriteData",
        "checkpoint.planner.WriteItem",
        "checkpoint.planner.WriteItemType",
        "pathlib.PosixPath",
        "torch.Size",
        "torch.serialization._get_layout",
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_that_asks_for_more_is_refused_in_one_line_and_runs_nothing(
    good: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good)
    (good / ".metadata").write_bytes(HOSTILE[name])
    with pytest.raises(BadInput) as refusal:
        read_metadata(good)
    assert len(str(refusal.value).splitlines()) == 1
    assert not Path(RAN).exists()
    assert RAN not in os.environ


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "another object"])
def test_common_values_that_ask_for_anything_are_refused(
    good: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good)
    with zipfile.ZipFile(good / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", HOSTILE[name])
    with pytest.raises(BadInput):
        check_training_checkpoint(good)
    assert not Path(RAN).exists()
    (good / "common.pt").write_bytes(HOSTILE[name])
    with pytest.raises(BadInput):
        check_common(good / "common.pt")
    assert not Path(RAN).exists()


def test_tensors_are_no_plain_values(good: Path) -> None:
    torch.save({"step": torch.ones(1)}, good / "common.pt")
    with pytest.raises(BadInput, match=r"asks for torch\._utils\._rebuild_tensor_v2"):
        check_common(good / "common.pt")


def test_a_stored_object_is_refused_where_megatron_would_unpickle_it(tmp_path: Path, good: Path) -> None:
    dcp.save({"weight": {"no": "tensor"}}, storage_writer=dcp.FileSystemWriter(tmp_path / "objects"))
    (good / ".metadata").write_bytes((tmp_path / "objects" / ".metadata").read_bytes())
    with pytest.raises(BadInput, match="is an object, where a training checkpoint has tensors alone"):
        check_training_checkpoint(good)


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "..", "below/file", None, 5])
def test_a_file_outside_the_folder_is_refused(good: Path, path: Any) -> None:
    def lead_outside(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = path

    change(good, lead_outside)
    with pytest.raises(BadInput, match="is not in its folder"):
        read_metadata(good)


def test_entries_that_are_no_tensors_are_refused(good: Path) -> None:
    def spoil(metadata: Metadata) -> None:
        metadata.state_dict_metadata["weight"] = "tensor"  # pyright: ignore[reportArgumentType]

    change(good, spoil)
    with pytest.raises(BadInput, match="'weight' is not a tensor"):
        read_metadata(good)


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"sharded_backend": "zarr"}', '{"sharded_backend": []}'])
def test_another_backend_is_refused(good: Path, content: str) -> None:
    (good / "metadata.json").write_text(content)
    with pytest.raises(BadInput, match=r"metadata\.json"):
        check_training_checkpoint(good)


@pytest.mark.parametrize(
    "content", ["", "../elsewhere", "/etc", "releases", "²", "9" * 5000, "-1", "1.5", "12\n../x", "\x00", "release/.."]
)
def test_a_tracker_that_names_neither_a_rollout_nor_release_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / TRACKER).write_text(content)
    with pytest.raises(BadInput, match="neither a rollout's number nor release"):
        checkpoint_folder(tmp_path)


@pytest.mark.parametrize(("content", "folder"), [("release\n", "release"), ("3", "iter_0000003")])
def test_a_tracker_names_a_rollout_or_release(good: Path, content: str, folder: str) -> None:
    (good.parent / TRACKER).write_text(content)
    if folder == "release":
        good.rename(good.parent / "release")
    assert checkpoint_folder(good.parent) == good.parent / folder
