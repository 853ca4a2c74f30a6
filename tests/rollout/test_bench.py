"""The figure of the client: what it costs beside the openai client on the same stub."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def test_the_client_does_ten_times_the_requests_of_the_openai_client():
    pytest.importorskip("openai")
    bench = Path(__file__).parents[2] / "tools" / "bench" / "client.py"
    text = subprocess.run(
        [sys.executable, str(bench), "--requests", "512"], capture_output=True, text=True, check=True, timeout=280
    ).stdout
    print(text)
    by_clock, by_processor_time = (float(word) for word in text.splitlines()[-1].split()[1:])
    assert by_clock > 10
    assert by_processor_time > 10
