"""CPU shim for Megatron-core: each piece handles one place that assumes CUDA.

Installed once by `backend.setup()`, only without CUDA. It replaces attributes of `torch.cuda`, wraps torch's factory
functions so that `device="cuda"` means the CPU, and patches three Megatron modules. What it replaces in torch acts on
calls from Megatron and this package alone: any other library of the process meets torch as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _device

_CPU = torch.device("cpu")
_OURS = ("megatron.", "vime.megatron.")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "eye", "as_tensor")
_LIKE_FACTORIES = ("zeros_like", "ones_like", "empty_like", "full_like")


def install() -> None:
    """Install every piece. Must run before Megatron's modules are imported (they bind some names at import)."""
    # `with torch.device(…)` knows the factories by identity, from its first use on: these must not be our wrappers.
    _device._device_constructors()
    _devices()
    _random_state()
    _streams()
    _factories()
    _tensor_methods()
    _no_compilation()
    _megatron()


def _for_megatron() -> bool:
    """True if the call of the function that asks came from Megatron or this package, perhaps through torch."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame = frame.f_back
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return name.startswith(_OURS)


def _replace(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Let calls from Megatron go to `ours`, and all others to what is there."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (ours if _for_megatron() else plain)(*args, **kwargs)

    setattr(owner, name, chosen)


def _devices() -> None:
    # Megatron uses the result as a device, for buffers of collectives and optimizer shards.
    _replace(torch.cuda, "current_device", lambda: _CPU)
    _replace(torch.cuda, "set_device", lambda device: None)
    _replace(torch.cuda, "synchronize", lambda device=None: None)
    _replace(torch.cuda, "empty_cache", lambda: None)


def _random_state() -> None:
    """Make the tracker of parallel random states fork the CPU generator."""

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    for module in (torch.cuda, torch.cuda.random):
        _replace(module, "get_rng_state", get_state)
        _replace(module, "set_rng_state", set_state)
    _replace(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed) and None)
    # Megatron warns at every fork that the CPU generator has moved, which here it must.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


class _Event:
    """Event that is always complete: CPU work is finished when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    """The only order in which a CPU executes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _streams() -> None:
    # Classes, also in annotations; torch's own cannot be made without CUDA.
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]
    _replace(torch.cuda, "current_stream", lambda device=None: _Stream())
    _replace(torch.cuda, "default_stream", lambda device=None: _Stream())
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        cuda, pinned = _is_cuda(kwargs.get("device")), kwargs.get("pin_memory")
        if (cuda or pinned) and _for_megatron():
            if cuda:
                kwargs["device"] = _CPU
            if pinned:
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _factories() -> None:
    for name in (*_FACTORIES, *_LIKE_FACTORIES):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _tensor_methods() -> None:
    plain_type, plain_to = torch.Tensor.type, torch.Tensor.to

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers accept only CUDA type names.
        answer = plain_type(self, *args, **kwargs)
        if not args and not kwargs and isinstance(answer, str) and _for_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named, given = _is_cuda(kwargs.get("device")), bool(args) and _is_cuda(args[0])
        if (named or given) and _for_megatron():
            if named:
                kwargs["device"] = _CPU
            if given:
                args = (_CPU, *args[1:])
        return plain_to(self, *args, **kwargs)

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)


def _no_compilation() -> None:
    # Megatron compiles small element-wise functions; on a CPU that costs more than it saves and needs a compiler.
    from megatron.core import jit

    jit.disable_jit_fuser()
    torch.compiler.set_stance("force_eager")


def _megatron() -> None:
    import megatron.core.tensor_parallel.random as parallel_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.tensor_parallel import mappings

    parallel_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    parallel_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    plain = moe_utils.maybe_move_tensor_to_cpu

    def splits_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The original keeps CPU tensors as tensors, but all_to_all requires plain numbers.
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return plain(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = splits_to_cpu
    _uneven_collectives(mappings)


def _uneven_collectives(mappings: Any) -> None:
    """Gather and scatter parts of uneven sizes for expert tensor parallelism, which gloo does not support."""
    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        part: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(part, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)])

    def scatter(
        whole: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter
