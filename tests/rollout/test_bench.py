"""The figure of the client: what it costs beside the openai client on the same stub."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def test_the_client_does_ten_times_the_requests_of_the_openai_client():
    pytest.importorskip("openai")
    path = Path(__file__).parents[2] / "tools" / "bench" / "client.py"
    spec = importlib.util.spec_from_file_location("bench_client", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench  # the benchmark's processes find their functions by this name
    spec.loader.exec_module(bench)
    found = bench.run(bench.Load(requests=512, concurrency=1024, long_share=0.02, long_tokens=8192))
    (vime, vime_by_cpu), (other, other_by_cpu) = found["vime"], found["openai"]
    print(f"vime {vime:.0f}/s ({vime_by_cpu:.0f} by processor time), openai {other:.0f}/s ({other_by_cpu:.0f})")
    assert vime_by_cpu > 10 * other_by_cpu
