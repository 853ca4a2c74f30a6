"""Identification of an HF model folder by its files and tensor names, and diagnosis of unsuitable folders."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.recipe.tables import TOKENIZER_CLASSES, TRANSFORMERS_VERSION

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_EMBEDDING = "model.embed_tokens.weight"
"""A tensor of every model that vime reads; names without it do not identify a model."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")
_OTHER_KINDS = (
    "adapter_config.json", "*.safetensors", "*.bin", "*.gguf", "*.pth", ".metadata",
    "latest_checkpointed_iteration.txt",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")


def other_kind(folder: Path) -> str:
    """One sentence that diagnoses a folder with neither an index nor a single safetensors file, with a remedy."""
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a model: merge it into its base model and save that"
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return f"{folder} has shards such as {shards[0].name}, but its index is missing: fetch {INDEX} or save it again"
    if others := sorted(folder.glob("*.safetensors")):
        return f"{folder} has {others[0].name}, but neither {INDEX} nor {SINGLE}: give the folder of an HF checkpoint"
    if weights := sorted(folder.glob("*.bin")):
        return f"{folder} has weights in {weights[0].name}: save them in the safetensors format (save_pretrained does)"
    if (weights := sorted(folder.glob("*.gguf"))) or (weights := sorted(folder.glob("*.pth"))):
        return f"{folder} has weights in {weights[0].name}: give the checkpoint in the safetensors format"
    if (folder / ".metadata").is_file() or (folder / "latest_checkpointed_iteration.txt").is_file():
        return f"{folder} is a torch_dist checkpoint: give it as --ref-load or --load, and an HF folder here"
    return f"{folder} has neither {INDEX} nor {SINGLE}: give the folder of an HF checkpoint"


def check_kind(folder: Path) -> None:
    """Raise BadInput for a folder whose files are weights of another kind. One without weights may still be fetched."""
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return
    if any(True for pattern in _OTHER_KINDS for _ in folder.glob(pattern)):
        raise BadInput(other_kind(folder))


def tensor_names(folder: Path) -> Collection[str]:
    """Names of a folder's tensors, from its index or its single file's header; empty if neither can be read."""
    try:
        if (folder / INDEX).is_file():
            return json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].keys()
        return header(folder / SINGLE).keys() - {"__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file. Raises OSError or ValueError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100 * 10**6:
            raise ValueError("not a safetensors file")
        return json.loads(file.read(length))


def check_names(folder: Path, names: Collection[str]) -> None:
    """Raise BadInput for tensor names of another kind of checkpoint."""
    for name in names:
        if name.startswith("base_model."):
            raise BadInput(f"{folder}: {name} is a name of an adapter: merge it into its base model and save that")
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            raise BadInput(
                f"{folder}: {name} holds all experts fused, as transformers 5 saves them: save one tensor per expert "
                "(transformers 4, or the published checkpoint)"
            )


def check_quantisation(folder: Path, hf: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise BadInput if `quantization_config` promises block fp8 but no tensor has a scale."""
    if hf.get("quantization_config") and _EMBEDDING in names and not any(name.endswith("_scale_inv") for name in names):
        raise BadInput(
            f"{folder}: config.json has a quantization_config, but no tensor has a scale: the weights are not "
            "quantised; remove quantization_config from config.json"
        )


def fitted(hf: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """`config.json` with the number of MTP layers that the tensors have, and a note if that differs."""
    layers = hf.get("num_hidden_layers")
    counted = int(hf.get("num_nextn_predict_layers") or 0)
    if _EMBEDDING not in names or not isinstance(layers, int):
        return dict(hf), []
    present = len({int(match[1]) for name in names if (match := _LAYER.fullmatch(name)) and int(match[1]) >= layers})
    if present == counted:
        return dict(hf), []
    told = f"config.json counts {counted} layers for multi-token prediction, the checkpoint has {present}"
    note = f"{told}: these are taken" if present > counted else f"{told}: the run continues without the others"
    return {**hf, "num_nextn_predict_layers": present}, [note]


def code_of_its_own(folder: Path) -> Iterator[str]:
    """Reasons why the folder's tokenizer needs the Python code that comes with it."""
    options = _tokenizer_options(folder)
    auto_map = options.get("auto_map")
    if isinstance(auto_map, Mapping) and "AutoTokenizer" in auto_map:
        yield f"auto_map names {auto_map['AutoTokenizer']}"
    name = options.get("tokenizer_class")
    if isinstance(name, str) and name.removesuffix("Fast") not in TOKENIZER_CLASSES:
        yield f"tokenizer_class is {name[:100]}, which transformers {TRANSFORMERS_VERSION} does not have"


def _tokenizer_options(folder: Path) -> Mapping[str, Any]:
    """`tokenizer_config.json`; empty where there is none that can be read."""
    try:
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return options if isinstance(options, Mapping) else {}


def check_tokenizer(folder: Path, *, trust_remote_code: bool) -> None:
    """Raise BadInput for a folder without a tokenizer, or whose tokenizer needs its own code, unless that is trusted.

    Without the code, transformers substitutes another tokenizer with different token ids. A `tokenizer.json` is
    self-contained, so a leftover `auto_map` next to it does no harm.
    """
    if trust_remote_code or (folder / "tokenizer.json").is_file():
        return
    if reasons := list(code_of_its_own(folder)):
        raise BadInput(
            f"the tokenizer of {folder} needs code that comes with the checkpoint ({'; '.join(reasons)}): read that "
            "code, then give --trust-remote-code, or add a tokenizer.json"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadInput(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): add the tokenizer's files of the "
            "model, or give --trust-remote-code if its code brings another"
        )
