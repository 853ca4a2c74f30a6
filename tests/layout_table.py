"""The layouts in which the trainer is tested, by model: trained as one process trains, and synced from."""

from __future__ import annotations

from typing import Any

SP = {"sequence_parallel": True}
DEEPSEEK: dict[str, dict[str, Any]] = {
    "dp2": {"world_size": 2},
    "pp2": {"world_size": 2, "pp": 2, "first_stage_layers": 1},
    "pp2_last": {"world_size": 2, "pp": 2, "last_stage_layers": 1},
    "cp2": {"world_size": 2, "cp": 2},
    "ep2": {"world_size": 2, "ep": 2},
    "tp2_ep2": {"world_size": 2, "tp": 2, "ep": 2, **SP},
    "tp2_etp2": {"world_size": 2, "tp": 2, "etp": 2, **SP},
    "tp2_ep1": {"world_size": 2, "tp": 2, **SP},
    "pp2_ep2": {"world_size": 4, "pp": 2, "ep": 2},
    "tp2_cp2_ep4": {"world_size": 4, "tp": 2, "cp": 2, "ep": 4, **SP},
    "cp2_dp2_ep2": {"world_size": 4, "cp": 2, "ep": 2},
    "tp2_pp2_cp2_ep4": {"world_size": 8, "tp": 2, "pp": 2, "cp": 2, "ep": 4, **SP},
    "tp2_pp2_dp2_etp2_ep2": {"world_size": 8, "tp": 2, "pp": 2, "etp": 2, "ep": 2, **SP},
}
QWEN3: dict[str, dict[str, Any]] = {
    "dp2": {"world_size": 2},
    "tp2": {"world_size": 2, "tp": 2},
    "tp2_sp": {"world_size": 2, "tp": 2, **SP},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2_tied": {"world_size": 2, "pp": 2, "first_stage_layers": 1},
    "tp2_cp2": {"world_size": 4, "tp": 2, "cp": 2, **SP},
}
QWEN3_MOE: dict[str, dict[str, Any]] = {
    "ep2": {"world_size": 2, "ep": 2},
    "tp2_ep1": {"world_size": 2, "tp": 2, **SP},
    "pp2_ep2": {"world_size": 4, "pp": 2, "ep": 2, "first_stage_layers": 1},
}
TABLE = {"deepseek": DEEPSEEK, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}
