"""The trainer on one GPU against the same on the CPU: activations, log-probs, every gradient, and two optimizer steps.

    python tools/bench/gpu/trainer_parity.py [--models deepseek qwen3 qwen3_moe] [--dtypes fp32 bf16] [--variants]

Needs torch, megatron-core with psutil, numpy and pydantic; each measurement is a process of its own. A difference says
nothing without a yardstick, so every one is divided by what rounding alone does on the CPU: in fp32 the difference that
weights off by one part in 2²³ make, in bf16 the distance of the CPU's own bf16 run from fp32, the largest of `--draws`
random models: which tokens rounding sends to another expert, and so how far that expert's gradient is off, is chance.
Adam has a large epsilon: with a small one its first step is the gradient's sign, which turns rounding into whole steps
where gradients are near zero. `--variants` repeats the GPU runs without fusions, with plain attention, and with TF32 as
a contrast.
Prints its ratios last and exits 1 where one is above its limit or the yardstick itself is too coarse to tell.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

LIMITS = {"fp32": 10.0, "bf16": 2.0}
COARSEST = {"fp32": 1e-3, "bf16": 1.0}
"""Above this relative difference the yardstick hides what is looked for."""
JITTER = 2.0**-23
LAYERS = 4
_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN3 = {**_COMMON, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e6}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek": {
        **_COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 8,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {**_QWEN3, "architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": {
        **_QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
}  # fmt: skip
VARIANTS = ("plain", "unfused", "math-attention", "tf32")

Tensors = dict[str, torch.Tensor]


# --- one measurement, in a process of its own


def weights(config: Any, jitter: float, draw: int) -> Tensors:
    """HF tensors of one random model with values that bf16 holds exactly, each off by a relative `jitter` x normal."""
    from vime.models.families import params_of

    generator = torch.Generator().manual_seed(7 + draw)
    noise = torch.Generator().manual_seed(11)
    found = {}
    for part in (part for param in params_of(config) for part in param.parts):
        value = torch.randn(part.shape, generator=generator)
        value = 1 + 0.1 * value if len(part.shape) == 1 else value / math.sqrt(part.shape[-1])
        if part.name.endswith("e_score_correction_bias"):
            value = 0.05 * (value - 1)
        exact = value.to(torch.bfloat16).float()
        found[part.name] = exact * (1 + jitter * torch.randn(part.shape, generator=noise))
    return found


def problem() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Sequences, every response token's weight in the loss, and its advantage."""
    from vime.megatron import losses
    from vime.megatron.microbatch import RolloutTokens

    draw = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(_COMMON["vocab_size"]) for _ in range(count)]

    pairs = [(tokens(draw.randint(4, 40)), tokens(draw.randint(20, 200))) for _ in range(16)]
    masks = [torch.ones(len(response)) for _, response in pairs]
    column = torch.cat(losses.token_weights(masks, per_token=False))
    advantages = torch.cat([torch.full((len(response),), draw.gauss(0, 1)) for _, response in pairs])
    return RolloutTokens.of(pairs), column, advantages


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in fp32 or bool, that later in-place work does not change."""
    return tensor.detach().to("cpu", torch.bool if tensor.dtype == torch.bool else torch.float32, copy=True)


class Activations:
    """The first output of every module in order of execution, on the host in fp32 (a mask of routes as bool)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.found: Tensors = {}
        self._hooks = [
            module.register_forward_hook(self._keeper(name))
            for name, module in model.named_modules()
            if name and type(module).__name__ not in ("IdentityOp", "IdentityFuncOp")
        ]

    def _keeper(self, name: str) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t)]
            for tensor, suffix in zip(tensors, ("", " routes"), strict=False):
                if suffix and tensor.dtype != torch.bool:
                    continue
                self.found[name + suffix] = host_copy(tensor)

        return keep

    def take(self) -> Tensors:
        for hook in self._hooks:
            hook.remove()
        return self.found


def measure(model: str, dtype: str, variant: str, jitter: float, draw: int, file: str) -> None:
    """Build, fill, and write what the model computes before and over two steps."""
    from vime.megatron import backend, parallel
    from vime.megatron.model import build_model
    from vime.megatron.objective import Objective
    from vime.megatron.optimizer import Optimizer
    from vime.megatron.passes import ModelPasses, Packer
    from vime.models import local as naming
    from vime.models.config import ModelConfig
    from vime.models.transform import shard_parts
    from vime.recipe.parallel import ParallelLayout
    from vime.recipe.schema import Recipe

    here = backend.setup()
    if variant == "unfused":
        from megatron.core import jit

        jit.disable_jit_fuser()
        torch.compiler.set_stance("force_eager")
    torch.backends.cuda.matmul.allow_tf32 = variant == "tf32"
    layout, config = ParallelLayout(), ModelConfig.from_hf(MODELS[model])
    recipe = Recipe(
        name="parity",
        model={"bf16": dtype == "bf16"},  # type: ignore[arg-type]
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 1 << 14},  # type: ignore[arg-type]
        algorithm={"use_kl_loss": True, "kl_loss_coef": 0.5},  # type: ignore[arg-type]
        optimizer={"lr": 0.5, "adam_eps": 10.0, "weight_decay": 0.0, "clip_grad": 0.0},  # type: ignore[arg-type]
    )
    coords = parallel.init_parallel(layout, rank=0, master_address="127.0.0.1", master_port=free_port())
    chunks: list[Any] = build_model(config, layout, bf16=dtype == "bf16")
    if variant == "unfused":
        for module in chunks[0].modules():
            if hasattr(module, "config"):
                module.config.bias_activation_fusion = module.config.bias_dropout_fusion = False
    optimizer = Optimizer(chunks, recipe, total_steps=2)
    tensors = naming.local_tensors(chunks, config, layout, coords)
    source = weights(config, jitter, draw)
    naming.fill(tensors, lambda param: shard_parts(param, source, layout, coords))
    optimizer.reload_master_weights()
    optimizer.check_master_weights()
    runner = ModelPasses(optimizer.chunks, Objective(recipe.algorithm, 1.0), Packer(recipe.perf, layout), coords)
    data, column, advantages = problem()
    limit = recipe.perf.max_tokens_per_gpu
    result: dict[str, Any] = {"device": str(here.device), "transformer_engine": here.transformer_engine, "losses": []}
    attention = contextlib.nullcontext()
    if variant == "math-attention":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attention = sdpa_kernel(SDPBackend.MATH)
    with attention:
        activations = Activations(chunks[0])
        old = runner.log_probs(data, limit)
        result["activations"], result["log_probs"] = activations.take(), old
        columns = {"weights": column, "advantages": advantages, "old": old, "reference": old}
        for step in range(2):
            optimizer.zero_grad()
            metrics = runner.gradients(data, range(len(data.sequences)), columns, limit)
            result["losses"].append(metrics["loss"])
            if step == 0:
                result["gradients"] = {
                    local.param.name: host_copy(local.tensor.main_grad)  # type: ignore[attr-defined]
                    for local in tensors
                    if hasattr(local.tensor, "main_grad")
                }
            optimizer.step()
        after = runner.log_probs(data, limit)
        result["log_probs_after"] = after
        result["moved"] = float((after - old).abs().mean())
        optimizer.zero_grad()
        result["losses"].append(runner.gradients(data, range(len(data.sequences)), columns, limit)["loss"])
    torch.save(result, file)
    parallel.destroy_parallel()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- comparison


def measured(
    folder: Path, model: str, dtype: str, *, gpu: bool, variant: str = "plain", jitter: float = 0.0, draw: int = 0
) -> Any:
    """The result of a process that sees the GPU or does not; kept in `folder`."""
    file = folder / f"{model}-{dtype}-{'gpu' if gpu else 'cpu'}-{variant}-{jitter > 0}-{draw}.pt"
    if not file.exists():
        environment = dict(os.environ) if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--measure", model, dtype, variant, str(jitter), str(draw), str(file)]
        subprocess.run(command, env=environment, check=True, timeout=600)
    return torch.load(file, weights_only=True)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖; for routes the share that differs. Infinite where shapes differ, as after other routes."""
    if a.shape != b.shape:
        return math.inf
    if a.dtype == torch.bool:
        return float((a != b).sum()) / max(float(b.sum()), 1.0)
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm else float((a - b).norm())


def compare(kind: str, ours: Tensors, theirs: Tensors, yards: list[tuple[Tensors, Tensors]], limit: float) -> float:
    """Distances of `ours` from `theirs`, each over the largest of a pair in `yards`; prints, returns the worst."""
    rows = []
    for name in theirs:
        if name not in ours or not all(name in yard for yard, _ in yards):
            continue
        error = distance(ours[name], theirs[name])
        units = [distance(yard[name], base[name]) for yard, base in yards]
        unit = max((each for each in units if math.isfinite(each)), default=math.inf)
        # Exact on the CPU twice over, as embeddings are: any rounding at all is allowed.
        rows.append((name, error, unit, error / max(unit, JITTER / 8)))
    beyond = [row for row in rows if row[3] > limit]
    # Routes are few and whole: one token that goes elsewhere is a large ratio of nothing.
    ratios = [row[3] for row in rows if math.isfinite(row[3]) and not row[0].endswith(" routes")]
    worst = sorted((row for row in rows if math.isfinite(row[3])), key=lambda row: -row[3])[:3]
    print(f"  {kind}: {len(rows)} compared, median ratio {sorted(ratios)[len(ratios) // 2]:.3g}")
    for name, error, unit, ratio in worst:
        print(f"    worst  {name}: {error:.3g} against {unit:.3g}, ratio {ratio:.3g}")
    for name, error, unit, ratio in beyond[:3]:
        print(f"    beyond the limit, in order of execution: {name}: {error:.3g} against {unit:.3g}, ratio {ratio:.3g}")
    return max(ratios)


def log_probs(run: Any) -> Tensors:
    """The log-probs before and after two steps."""
    return {kind: run[kind] for kind in ("log_probs", "log_probs_after")}


def parity(folder: Path, model: str, dtype: str, variant: str, device: str, draws: int) -> dict[str, float]:
    """The worst ratio of each kind, and the yardstick's own coarseness."""
    gpu = measured(folder, model, dtype, gpu=device == "cuda", variant=variant)
    bases = [measured(folder, model, "fp32", gpu=False, draw=draw) for draw in range(draws)]
    jitter = JITTER if dtype == "fp32" else 0.0
    yards = [measured(folder, model, dtype, gpu=False, jitter=jitter, draw=draw) for draw in range(draws)]
    pairs, base = list(zip(yards, bases, strict=True)), bases[0]
    spec = "Transformer Engine" if gpu["transformer_engine"] else "local"
    print(
        f"{model} {dtype} {variant} on {gpu['device']} ({spec} spec): losses {[round(x, 6) for x in gpu['losses']]}, "
        f"CPU {[round(x, 6) for x in base['losses']]}, log-probs moved by {gpu['moved']:.3g}"
    )
    limit = LIMITS[dtype]
    found = {
        kind: compare(kind, gpu[kind], base[kind], [(yard[kind], its[kind]) for yard, its in pairs], limit)
        for kind in ("activations", "gradients")
    }
    found["log-probs"] = compare(
        "log-probs", log_probs(gpu), log_probs(base), [(log_probs(yard), log_probs(its)) for yard, its in pairs], limit
    )
    coarse = max(
        distance(yard["log_probs_after"] - yard["log_probs"], its["log_probs_after"] - its["log_probs"])
        for yard, its in pairs
    )
    print(f"  what two steps do to the log-probs, the yardstick's relative difference: {coarse:.3g}")
    found["coarseness"] = coarse / COARSEST[dtype] * limit
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--variants", action="store_true", help="also run the GPU unfused, with plain attention, TF32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu compares the CPU with itself")
    parser.add_argument("--draws", type=int, default=3, help="random models of the yardstick")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    if args.measure:
        model, dtype, variant, jitter, draw, file = args.measure
        measure(model, dtype, variant, float(jitter), int(draw), file)
        return 0
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    lines, failed = [], False
    with tempfile.TemporaryDirectory(prefix="vime-parity-") as name:
        for model in args.models:
            for dtype in args.dtypes:
                for variant in VARIANTS if args.variants else VARIANTS[:1]:
                    ratios = parity(Path(name), model, dtype, variant, args.device, args.draws)
                    text = ", ".join(f"{kind} {ratio:.3g}" for kind, ratio in ratios.items())
                    lines.append(f"{model} {dtype} {variant}: {text} (limit {LIMITS[dtype]:g})")
                    failed |= variant == "plain" and max(ratios.values()) > LIMITS[dtype]
    print("ratios of the difference to the yardstick:")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
