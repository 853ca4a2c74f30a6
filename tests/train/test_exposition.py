"""The driver's page answers on loopback, to the holder of its key alone, and its scrape file is private."""

from __future__ import annotations

import stat
from pathlib import Path

import aiohttp
import yaml

from tests.support.launch_stub import make_plan, stub
from vime.rollout.client import EngineError
from vime.run.metrics import MetricsWriter
from vime.run.tokens import METRICS_KEY, make_tokens, read_token, token_path
from vime.train.exposition import SCRAPE_FILE, Exposition


class Engine:
    """An engine's page; the second one is dead."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    async def metrics(self) -> str:
        if self._text is None:
            raise EngineError("gone")
        return self._text


async def get(address: str, key: str | None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics", headers=headers) as answer:
        return answer.status, await answer.text()


async def test_only_the_key_of_the_run_opens_it(tmp_path: Path):
    plan = make_plan(tmp_path, [stub("train", "")])
    make_tokens(tmp_path)
    live = Exposition(plan)
    metrics = MetricsWriter(tmp_path, [live])
    metrics.write(4, {"train/loss": 0.5, "train/kl_loss": float("nan")})
    live.follow([Engine("# TYPE vllm:x gauge\nvllm:x 1.0\n"), Engine(None)])  # pyright: ignore[reportArgumentType]
    async with live:
        path = tmp_path / SCRAPE_FILE
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        (job,) = yaml.safe_load(path.read_text())["scrape_configs"]
        (address,) = job["static_configs"][0]["targets"]
        assert address.startswith("127.0.0.1:")
        assert job["authorization"]["credentials_file"] == str(token_path(tmp_path, METRICS_KEY))
        key = read_token(tmp_path, METRICS_KEY)
        for wrong in (None, "", "other", read_token(tmp_path, "api_key")):
            status, text = await get(address, wrong)
            assert status == 401
            assert "vime_" not in text
        status, text = await get(address, key)
    metrics.close()
    assert status == 200
    assert text.splitlines() == [
        "# TYPE vime_rollout gauge",
        "vime_rollout 4.0",
        "# TYPE vime_train_loss gauge",
        "vime_train_loss 0.5",
        "# TYPE vllm:x gauge",
        'vllm:x{server="0"} 1.0',
    ]
    assert not path.exists()
