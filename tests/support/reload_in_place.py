"""Test program: reloads an engine's own weights in place, without and with vime's fixes of vLLM.

    VLLM_PLUGINS= python -m tests.support.reload_in_place FOLDER OUTPUT

Writes the answers to a prompt as JSON: before, after a reload by vLLM alone, and after one with the fixes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.fresh_engine import PROMPTS, answer, load


def reload(worker: Any, folder: str, mend: bool) -> None:
    """In the worker: what every weight-transfer backend of vLLM does, with the weights that it has already."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from vime.sync.vllm_plugin import mend_cpu_experts

    if mend:
        mend_cpu_experts()
    model = worker.get_model()
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(load_file(Path(folder) / "model.safetensors").items())
        finalize_layerwise_reload(model, worker.model_config)


def main(folder: str, output: str) -> None:
    llm = load(folder)
    found = {"before": answer(llm, PROMPTS[0])}
    for name, mend in (("vllm", False), ("mended", True)):
        llm.collective_rpc(reload, args=(folder, mend))
        llm.reset_prefix_cache()
        found[name] = answer(llm, PROMPTS[0])
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
