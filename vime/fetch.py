"""`python -m vime.fetch`: download a recipe's models and data sets to $BASE_DIR, on a node with network."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vime.checkpoint import download
from vime.checkpoint.download import Listing, RemoteFile, Source
from vime.checkpoint.progress import Progress
from vime.cli import command
from vime.errors import BadInput
from vime.planning.cluster import load_cluster
from vime.recipe.load import absolute_path, load_recipe
from vime.system.files import require_space

_NAMED = 20


def sources(recipe: str, base_dir: str | None) -> list[Source]:
    """Repositories that the recipe names under `fetch`, with absolute folders."""
    found = load_recipe(recipe).source.fetch
    if not found:
        raise BadInput(f"the recipe {recipe} names nothing to fetch: see the comments at the top of its file")
    if base_dir is None and any("BASE_DIR" in folder for folder in found):
        raise BadInput("$BASE_DIR is not set: give --base-dir, or set it in the environment")
    return [Source.parse(absolute_path(folder, base_dir), text) for folder, text in found.items()]


def check(source: Source, *, deep: bool) -> bool:
    """Print what is missing of one repository, without network; return whether it is complete."""
    listing = download.noted(source)
    if listing is None:
        print(f"{source.folder}: nothing is known of {source.repository} there: run python -m vime.fetch")
        return False
    wrong, verified = download.look(listing, deep=deep)
    if not wrong:
        size = sum(file.size for file in listing.files)
        print(f"{source.folder}: {source.repository} is complete, {len(listing.files)} files, {size / 1e9:.2f} GB")
        if os.access(source.folder, os.W_OK):
            download.note(listing, verified)
        return True
    for file, why in wrong[:_NAMED]:
        print(f"{source.folder / file.path} {why}")
    more = f", {len(wrong) - _NAMED} more than named" if len(wrong) > _NAMED else ""
    size = sum(file.size for file, _ in wrong)
    print(f"{source.folder}: {len(wrong)} of {len(listing.files)} files of {source.repository} to fetch{more}, "
          f"{size / 1e9:.2f} GB")  # fmt: skip
    return False


def fetch(found: Sequence[Source]) -> None:
    """Download what is missing of all repositories. Raises BadInput, before the first byte, if a disk is too small."""
    work: list[tuple[Listing, list[RemoteFile]]] = []
    for source in found:
        listing = download.list_remote(source)
        wrong, verified = download.look(listing, deep=False)
        for file, why in wrong:
            if why != "is missing":
                print(f"{source.folder / file.path} {why}: it is fetched again", file=sys.stderr)
        work.append((listing, [file for file, _ in wrong]))
        if not wrong:
            download.note(listing, verified)
    for device, needed in _needed(work).items():
        require_space(device, needed)
    for listing, files in work:
        if files:
            _, verified = download.look(listing, deep=False)
            download.note(listing, verified)
            progress = Progress(f"fetch {listing.source.repository}:", sum(file.size for file in files))
            download.bring(listing, files, progress)
            progress.close()
            folder = listing.source.folder
            stamps = {file.path: download.stamp_of(folder / file.path) for file in files}
            download.note(listing, verified | {path: stamp for path, stamp in stamps.items() if stamp})
        print(f"{listing.source.folder} is complete: {listing.source.repository} at {listing.commit[:12]}")


def _needed(work: Sequence[tuple[Listing, list[RemoteFile]]]) -> dict[Path, int]:
    """Bytes to download per file system, keyed by an existing folder of it."""
    by_device: dict[int, tuple[Path, int]] = {}
    for listing, files in work:
        folder = listing.source.folder
        there = [download.stamp_of(download.part_of(folder, file)) for file in files]
        needed = sum(file.size for file in files) - sum(stamp[0] for stamp in there if stamp)
        while not folder.exists():
            folder = folder.parent
        place, before = by_device.get(folder.stat().st_dev, (folder, 0))
        by_device[folder.stat().st_dev] = (place, before + needed)
    return dict(by_device.values())


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vime.fetch",
        description="Download a recipe's models and data sets to $BASE_DIR, on a node with network (usually the login "
        "node). Interrupted downloads resume; size and hash of every file are verified. "
        "HF_TOKEN and HF_ENDPOINT are those of huggingface_hub.",
    )
    add = parser.add_argument
    add("--recipe", default="deepseek-r1", help="name or YAML file")
    add("--base-dir", help="the shared folder of models and data; default: $BASE_DIR, then the profile's")
    add("--cluster", help="name or YAML file of a cluster profile, for its base-dir")
    add("--check", action="store_true", help="list missing files without network; exit code 2 if there are any")
    add("--verify", choices=("quick", "deep"), default="quick", help="deep: hash verified files again")
    args = parser.parse_args(argv)
    base_dir = args.base_dir or os.environ.get("BASE_DIR") or None
    if base_dir is None and args.cluster:
        base_dir = load_cluster(args.cluster).base_dir
    found = sources(args.recipe, os.path.abspath(os.path.expanduser(base_dir)) if base_dir else None)
    deep = args.verify == "deep"
    if not args.check:
        fetch(found)
        if not deep:
            return 0
    complete = [check(source, deep=deep) for source in found]
    return 0 if all(complete) else int(BadInput.cause)


if __name__ == "__main__":
    sys.exit(main())
