"""Run as a program by a test: reload an engine's own weights in place, without and with vime's mends of vLLM.

    VLLM_PLUGINS= python -m tests.sync.reload_in_place FOLDER

Prints the log-probs of a prompt as JSON: before, after a reload by vLLM alone, after one with the mends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPT = [2, 9, 16, 8, 17, 3, 7, 7, 12]


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


def main(folder: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        max_model_len=64,
        max_num_seqs=2,
        enforce_eager=True,
        compilation_config={"custom_ops": ["-rotary_embedding"]},
    )

    def log_probs() -> list[float]:
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        answer = llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)[0]
        assert answer.prompt_logprobs is not None
        return [next(iter(position.values())).logprob for position in answer.prompt_logprobs[1:] if position]

    found = {"before": log_probs()}
    for name, mend in (("vllm", False), ("mended", True)):
        llm.collective_rpc(reload, args=(folder, mend))
        llm.reset_prefix_cache()
        found[name] = log_probs()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
