"""Layouts in which the trainer is tested, by model: trained as in one process, and used as source of a weight sync."""

from __future__ import annotations

from typing import Any

SP = {"sequence_parallel": True}
# One layout of every kind of parallelism and the widest products; those of `FULL` run with `--full` besides.
DEEPSEEK: dict[str, dict[str, Any]] = {
    "dp2": {"world_size": 2},
    "pp2": {"world_size": 2, "pp": 2, "first_stage_layers": 1},
    "cp2": {"world_size": 2, "cp": 2},
    "ep2": {"world_size": 2, "ep": 2},
    "tp2_etp2": {"world_size": 2, "tp": 2, "etp": 2, **SP},
    "tp2_ep1": {"world_size": 2, "tp": 2, **SP},
    "cp2_dp2_ep2": {"world_size": 4, "cp": 2, "ep": 2},
    "tp2_pp2_cp2_ep4": {"world_size": 8, "tp": 2, "pp": 2, "cp": 2, "ep": 4, **SP},
    "tp2_pp2_dp2_etp2_ep2": {"world_size": 8, "tp": 2, "pp": 2, "etp": 2, "ep": 2, "last_stage_layers": 1, **SP},
}
DEEPSEEK_FULL: dict[str, dict[str, Any]] = {
    "pp2_last": {"world_size": 2, "pp": 2, "last_stage_layers": 1},
    "pp3_both": {"world_size": 3, "pp": 3, "first_stage_layers": 1, "last_stage_layers": 1},
    "tp2_ep2": {"world_size": 2, "tp": 2, "ep": 2, **SP},
    "pp2_ep2": {"world_size": 4, "pp": 2, "ep": 2},
    "pp4": {"world_size": 4, "pp": 4},
    "tp2_cp2_ep4": {"world_size": 4, "tp": 2, "cp": 2, "ep": 4, **SP},
    "tp4_ep2": {"world_size": 4, "tp": 4, "ep": 2, **SP},
    "cp4": {"world_size": 4, "cp": 4},
    "pp2_cp2_dp2_ep4": {"world_size": 8, "pp": 2, "cp": 2, "ep": 4},
    "tp2_dp4_ep8": {"world_size": 8, "tp": 2, "ep": 8, **SP},
    "tp2_cp2_dp2_ep1": {"world_size": 8, "tp": 2, "cp": 2, **SP},
}
QWEN3: dict[str, dict[str, Any]] = {
    "tp2": {"world_size": 2, "tp": 2},
    "cp2_dp2": {"world_size": 4, "cp": 2},
    "tp2_pp2_cp2": {"world_size": 8, "tp": 2, "pp": 2, "cp": 2, "first_stage_layers": 1, **SP},
}
QWEN3_FULL: dict[str, dict[str, Any]] = {
    "dp2": {"world_size": 2},
    "tp2_sp": {"world_size": 2, "tp": 2, **SP},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2_tied": {"world_size": 2, "pp": 2, "first_stage_layers": 1},
    "tp2_cp2": {"world_size": 4, "tp": 2, "cp": 2, **SP},
    "tp2_dp2": {"world_size": 4, "tp": 2, **SP},
}
QWEN3_MOE: dict[str, dict[str, Any]] = {
    "tp2_ep1": {"world_size": 2, "tp": 2, **SP},
    "pp2_ep2": {"world_size": 4, "pp": 2, "ep": 2, "first_stage_layers": 1},
}
QWEN3_MOE_FULL: dict[str, dict[str, Any]] = {
    "ep2": {"world_size": 2, "ep": 2},
    "tp2_etp2": {"world_size": 2, "tp": 2, "etp": 2, **SP},
    "cp2_dp2_ep4": {"world_size": 4, "cp": 2, "ep": 4},
    "tp2_cp2_dp2_ep8": {"world_size": 8, "tp": 2, "cp": 2, "ep": 8, **SP},
}
TABLE = {"deepseek": DEEPSEEK, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}
FULL = {"deepseek": DEEPSEEK_FULL, "qwen3": QWEN3_FULL, "qwen3_moe": QWEN3_MOE_FULL}
