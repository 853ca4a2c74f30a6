"""Processor time of an engine's server for an answer: vime's token route against vLLM's own.

    python tools/bench/answers.py [--tokens 1024]

Both make the bytes of an answer out of the engine's last output of a request, as in the server's event loop, which
hands on the tokens of all requests meanwhile. Prints microseconds a token and exits 1 where vime's takes more than a
tenth of vLLM's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from fastapi.responses import JSONResponse  # noqa: E402
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (  # noqa: E402
    GenerateTokensChoice,
    GenerateTokensResponse,
)
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens  # noqa: E402
from vllm.logprobs import FlatLogprobs, Logprob  # noqa: E402
from vllm.outputs import CompletionOutput, RequestOutput  # noqa: E402

from vime.rollout.fast_answers import encoded  # noqa: E402

WANTED = 0.1
ROUNDS = 20


def theirs(ids: list[int], log_probs: list[dict[int, Logprob]]) -> bytes:
    """vLLM's answer: an object for each token, dumped, then written as JSON."""
    handler: Any = object.__new__(ServingTokens)
    content = handler._create_tokens_logprobs(token_ids=ids, top_logprobs=log_probs, num_output_top_logprobs=0)
    choice = GenerateTokensChoice(index=0, logprobs=content, finish_reason="stop", token_ids=ids)
    answer = GenerateTokensResponse(request_id="r", created=1, model="m", usage=None, choices=[choice])
    return bytes(JSONResponse(content=answer.model_dump()).body)


def seconds(call: Callable[[], bytes]) -> float:
    """Least seconds of a call, after one to warm up."""
    call()
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    tokens = parser.parse_args().tokens
    ids, values = list(range(tokens)), [-1.2345678806304932 - place / 64 for place in range(tokens)]
    plain = [{token: Logprob(value, 3)} for token, value in zip(ids, values, strict=True)]
    flat = FlatLogprobs(ids, [place + 1 for place in ids], ids, values, [3] * tokens, [None] * tokens)
    output = RequestOutput("r", None, [1], None, [CompletionOutput(0, "", ids, 0.0, flat, finish_reason="stop")], True)
    own, other = seconds(lambda: encoded(output)), seconds(lambda: theirs(ids, plain))
    print(f"{tokens} tokens: vime {own / tokens * 1e6:.2f} µs a token, vLLM {other / tokens * 1e6:.2f} µs a token")
    print(f"answers: {own / other:.3f} (wanted at most {WANTED})")
    return 0 if own <= WANTED * other else 1


if __name__ == "__main__":
    sys.exit(main())
