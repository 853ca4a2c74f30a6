"""Finding and reading vime's own YAML files, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml

from vime.errors import BadInput

Kind = Literal["models", "recipes", "clusters"]
_PACKAGE = Path(__file__).resolve().parent.parent


def data_folder(name: Literal["configs", "slurm"]) -> Path:
    """The repository's `configs/` or `slurm/`; a wheel carries them as `vime/configs` and `vime/slurm_templates`."""
    checkout = _PACKAGE.parent / name
    if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return _PACKAGE / {"configs": "configs", "slurm": "slurm_templates"}[name]


_PAGES: dict[Kind, str] = {"clusters": "clusters.md", "recipes": "recipes.md", "models": "families.md"}
"""Page of the documentation about each kind."""


def user_folder() -> Path:
    """A person's own configuration: `$XDG_CONFIG_HOME/vime`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "vime"


def names(kind: Kind) -> list[str]:
    """Names of the files of a kind, a person's own included."""
    folders = (data_folder("configs") / kind, user_folder() / kind)
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def find(kind: Kind, name: str) -> Path:
    """The file named `name`: a path when it has a separator or ends in .yaml, else a person's own, else vime's."""
    if os.sep in name or name.endswith((".yaml", ".yml")):
        if (path := Path(name).expanduser()).is_file():
            return path
        raise BadInput(f"no {kind.removesuffix('s')} file at {path}: give the path of a YAML file or a known name")
    for folder in (user_folder() / kind, data_folder("configs") / kind):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    known = ", ".join(names(kind))
    raise BadInput(f"unknown {kind.removesuffix('s')} {name!r}: give a path or one of {known} (docs/{_PAGES[kind]})")


def read(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}: write one `option: value` a line")
    return content
