"""Megatron's torch_dist back to an HF checkpoint, in bf16 (or as was stored) or block fp8, one tensor at a time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.hf_writer import MAX_SHARD_BYTES, HFWriter
from vime.checkpoint.progress import Progress
from vime.checkpoint.safetensors_file import Spec
from vime.checkpoint.torch_dist import TorchDistReader
from vime.errors import BadInput, VimeError
from vime.fp8.quantise import is_quantised, quantise, scale_name, scale_shape
from vime.models.config import ModelConfig, Quantisation
from vime.models.families import params_of
from vime.models.namemap import HFTensor, Param, Where
from vime.models.transform import split


def export(
    source: str | Path,
    hf_checkpoint: str | Path,
    target: str | Path,
    *,
    quantised: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a torch_dist checkpoint as an HF folder, with config, tokenizer and tensor dtypes from `hf_checkpoint`.

    `quantised` stores in block fp8 what that checkpoint's `quantization_config` (or, without one, 128 x 128 blocks)
    quantises; otherwise fp8 tensors are written in bf16 and the config loses its `quantization_config`. MTP layers
    missing from the torch_dist checkpoint come from `hf_checkpoint`; their copies of embedding and head get the current
    values. Raises BadInput for a checkpoint of another model or a target that is not empty.
    """
    original = HFCheckpoint(hf_checkpoint)
    config = original.config
    original.check(params_of(config))
    reader = TorchDistReader(source, config)
    trained = [param for param in params_of(config) if param in reader or param.where != Where.MTP]
    kept = [param for param in params_of(config) if param.where == Where.MTP and param not in reader]
    scheme = (config.quantisation or Quantisation()) if quantised else None
    parts = [part for param in trained + kept for part in param.parts]
    specs = [spec for part in parts for spec in tensor_specs(part, original, scheme)]
    writer = HFWriter(target, specs, max_shard_bytes=max_shard_bytes)
    writer.create()
    progress = Progress("export:", writer.total_bytes)
    for name, tensor in _tensors(trained, kept, reader, original, scheme):
        writer.write(name, tensor)
        progress.add(writer.places[name].end - writer.places[name].begin)
    progress.close()
    writer.publish(copy_from=original.path, config=exported_config(config, scheme))


def _tensors(
    trained: Sequence[Param],
    kept: Sequence[Param],
    reader: TorchDistReader,
    original: HFCheckpoint,
    scheme: Quantisation | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    for param in trained:
        tensors = split(param, reader.read(param))
        for part in param.parts:
            yield from stored(part, tensors[part.name], original, scheme)
    for part in (part for param in kept for part in param.parts):
        if is_quantised(part.name, part.quantised, scheme) and original.is_quantised(part.name):
            yield part.name, original.stored(part.name)
            yield scale_name(part.name), original.scale(part.name)
        else:
            yield from stored(part, original.tensor(part.name), original, scheme)


def tensor_specs(part: HFTensor, original: HFCheckpoint, scheme: Quantisation | None) -> Iterator[Spec]:
    """Entries written for a tensor: itself or fp8 and scale, and every copy that the original has."""
    names = [part.name, *(alias for alias in part.aliases if alias in original)]
    if is_quantised(part.name, part.quantised, scheme):
        assert scheme is not None
        yield Spec(part.name, torch.float8_e4m3fn, part.shape)
        yield Spec(scale_name(part.name), torch.float32, scale_shape(part.shape, scheme.block))
        return
    dtype = torch.bfloat16 if original.is_quantised(part.name) else original.info(part.name).dtype
    for name in names:
        yield Spec(name, dtype, part.shape)


def stored(
    part: HFTensor, tensor: torch.Tensor, original: HFCheckpoint, scheme: Quantisation | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors announced by `tensor_specs`, from the current value."""
    if is_quantised(part.name, part.quantised, scheme):
        assert scheme is not None
        values, scale = quantise(tensor, scheme.block, scale_format=scheme.scale_format, name=part.name)
        yield part.name, values
        yield scale_name(part.name), scale
        return
    for spec in tensor_specs(part, original, scheme):
        yield spec.name, tensor


def exported_config(config: ModelConfig, scheme: Quantisation | None) -> dict[str, Any]:
    """The original `config.json` with the `quantization_config` that fits the exported weights."""
    values = {key: value for key, value in config.hf.items() if key != "quantization_config"}
    if scheme is None:
        return values
    made = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(scheme.block),
    }
    return {**values, "quantization_config": config.hf.get("quantization_config") or made}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/convert_torch_dist_to_hf.py; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--load", required=True, help="torch_dist folder, or one with a tracker file")
    parser.add_argument(
        "--hf-checkpoint", required=True, help="HF folder of the model's config, tokenizer and MTP layers"
    )
    parser.add_argument("--save", required=True, help="new HF folder")
    parser.add_argument("--quantise", action="store_true", help="store in block fp8")
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES)
    given = parser.parse_args(argv)
    try:
        if given.max_shard_bytes < 1:
            raise BadInput(f"--max-shard-bytes is {given.max_shard_bytes}: give a positive number")
        export(
            given.load,
            given.hf_checkpoint,
            given.save,
            quantised=given.quantise,
            max_shard_bytes=given.max_shard_bytes,
        )
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    except OSError as error:
        print(f"error: {error.filename or given.save}: {error.strerror}", file=sys.stderr)
        return int(BadInput.cause)
    print(f"{given.save} is complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
