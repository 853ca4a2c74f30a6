"""Fetching a Hub repository to a folder: resumed at the byte of an interruption, verified by size and hash.

`.vime-fetch.json` next to the files lists the repository's content, so that a node without network can tell what is
missing. Needs no torch; huggingface_hub is imported only to list or fetch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vime.checkpoint.progress import Progress
from vime.errors import BadInput, VimeError
from vime.system.files import READABLE, publish_file, read_json, write_json

NOTES = ".vime-fetch.json"
WORKERS = 8
# Weights in other formats, skipped if there are safetensors.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".ot")
_CHUNK = 1 << 20


class FetchFailed(VimeError):
    """The Hub cannot be reached, or sent content that differs from its listing."""


@dataclass(frozen=True)
class Source:
    """A repository and its target folder."""

    folder: Path
    repository: str
    kind: Literal["model", "dataset"] = "model"
    revision: str = "main"

    @classmethod
    def parse(cls, folder: str, text: str) -> Source:
        """Parse the recipe's spelling: `deepseek-ai/DeepSeek-R1`, `datasets/owner/name`, either with `@revision`."""
        name, _, revision = text.partition("@")
        kind = "dataset" if name.startswith("datasets/") else "model"
        name = name.removeprefix("datasets/")
        if len(parts := name.split("/")) != 2 or not all(parts):
            raise BadInput(
                f"--fetch names {text!r}: give owner/name or datasets/owner/name, with @revision if you like"
            )
        return cls(Path(folder), name, kind, revision or "main")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    path: str
    size: int
    digest: str
    """sha256 of large files, git's sha1 of small ones, as in the Hub's listing."""


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    source: Source
    commit: str
    files: tuple[RemoteFile, ...]


def list_remote(source: Source) -> Listing:
    """List the repository on the Hub. Raises BadInput if it is unknown, FetchFailed if the Hub is unreachable."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{source.repository} ({source.kind}) on {constants.ENDPOINT}"
    try:
        info: Any = HfApi().repo_info(
            source.repository, repo_type=source.kind, revision=source.revision, files_metadata=True, timeout=30
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadInput(
            f"there is no {where} at {source.revision}, or you have no access: check the name and HF_TOKEN"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FetchFailed(_unreachable(where, error)) from error
    except Exception as error:
        raise _network_error(where, error) from error
    files = [
        RemoteFile(each.rfilename, each.size, each.lfs.sha256 if each.lfs else each.blob_id) for each in info.siblings
    ]
    return Listing(source, info.sha, tuple(wanted(files)))


def _unreachable(what: str, error: Exception) -> str:
    return f"cannot fetch {what}: {' '.join(str(error).split())}: is this a node with network, and HF_ENDPOINT right?"


def _network_error(what: str, error: Exception) -> Exception:
    """The error of huggingface_hub's HTTP library as FetchFailed; any other error unchanged."""
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
        return FetchFailed(_unreachable(what, error))
    return error


def wanted(files: Sequence[RemoteFile]) -> Iterator[RemoteFile]:
    """Files except duplicate weights in another format. Raises BadInput for a name that points outside the folder."""
    has_safetensors = any(file.path.endswith(".safetensors") for file in files)
    for file in files:
        if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
            raise BadInput(f"the repository names a file {file.path!r}, which is not below its folder: do not use it")
        if not (has_safetensors and file.path.endswith(_OTHER_WEIGHTS)) and file.path != ".gitattributes":
            yield file


def noted(source: Source) -> Listing | None:
    """Listing noted in the folder by an earlier fetch; None without one."""
    content = read_json(source.folder / NOTES)
    if not isinstance(content, dict) or content.get("repository") != source.repository:
        return None
    if content.get("revision") != source.revision or content.get("kind") != source.kind:
        return None
    return Listing(source, content["commit"], tuple(RemoteFile(*entry) for entry in content["files"]))


def note(listing: Listing, verified: dict[str, list[int]]) -> None:
    """Write the notes: the listing, and size and time of the files with a verified hash."""
    source = listing.source
    source.folder.mkdir(parents=True, exist_ok=True)
    content = {"repository": source.repository, "kind": source.kind, "revision": source.revision}
    content |= {"commit": listing.commit, "files": [[f.path, f.size, f.digest] for f in listing.files]}
    write_json(source.folder / NOTES, {**content, "verified": verified}, mode=READABLE)


def look(listing: Listing, *, deep: bool) -> tuple[list[tuple[RemoteFile, str]], dict[str, list[int]]]:
    """(incorrect files, each with the reason; verified files with size and time).

    A file with the size and time of its last verification is not hashed again, unless `deep`.
    """
    folder = listing.source.folder
    notes = read_json(folder / NOTES)
    before = notes.get("verified", {}) if isinstance(notes, dict) and notes.get("commit") == listing.commit else {}

    def one(file: RemoteFile) -> str:
        stamp = stamp_of(folder / file.path)
        if stamp is None:
            return "is missing"
        if stamp[0] != file.size:
            return f"has {stamp[0]} bytes instead of {file.size}"
        if not deep and before.get(file.path) == stamp:
            return ""
        return "" if has_digest(folder / file.path, file) else "has another hash than the repository's"

    with ThreadPoolExecutor(WORKERS) as pool:
        words = list(pool.map(one, listing.files))
    wrong = [(file, word) for file, word in zip(listing.files, words, strict=True) if word]
    stamps = {
        file.path: stamp_of(folder / file.path) for file, word in zip(listing.files, words, strict=True) if not word
    }
    return wrong, {path: stamp for path, stamp in stamps.items() if stamp}


def stamp_of(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns]


def has_digest(path: Path, file: RemoteFile) -> bool:
    """True if the file's bytes have the announced hash."""
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest() == file.digest


def part_of(folder: Path, file: RemoteFile) -> Path:
    """Path of an incomplete file; named by its hash, so that another version never continues it."""
    return folder / ".cache" / "vime" / f"{file.digest}.part"


def bring(listing: Listing, files: Sequence[RemoteFile], progress: Progress) -> None:
    """Fetch files into the folder, several at once. Raises FetchFailed naming the first failure."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(lambda file: _bring(listing, file, progress), files):
            pass


def _bring(listing: Listing, file: RemoteFile, progress: Progress) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    source, part, target = listing.source, part_of(listing.source.folder, file), listing.source.folder / file.path
    part.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(source.repository, file.path, repo_type=source.kind, revision=listing.commit)
    try:
        with part.open("ab") as stream:
            there = stream.tell()
            if there > file.size:
                stream.truncate(0)
                there = 0
            progress.add(there)
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            if there < file.size:
                http_get(
                    url,
                    stream,
                    resume_size=there,
                    headers=headers,
                    expected_size=file.size,
                    tqdm_class=_bar(progress.add),
                )
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise FetchFailed(_unreachable(f"{file.path} of {source.repository}", error)) from error
    except Exception as error:
        raise _network_error(f"{file.path} of {source.repository}", error) from error
    if not has_digest(part, file):
        part.unlink()
        raise FetchFailed(
            f"{file.path} of {source.repository} arrived with a hash other than {file.digest[:12]}…: "
            "the file was removed, fetch again"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    publish_file(part, target)


def _bar(add: Callable[[int], None]) -> Any:
    """A silent tqdm that adds to vime's progress."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            add(int(n or 0))
            return None

    return Bar
