"""The driver's page for Prometheus (`--prometheus`): on loopback, for those who hold its key."""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vime.observe.prometheus import page, scrape_config
from vime.rollout.client import EngineClient, EngineError
from vime.run.plan import Plan
from vime.run.tokens import METRICS_KEY, read_token, token_path
from vime.run.usage import read_usage
from vime.system.files import PRIVATE, write_file

SCRAPE_FILE = "prometheus.yml"
_LOOPBACK = "127.0.0.1"
_ENGINE_SECONDS = 5.0


class Exposition:
    """A tracker that keeps the newest values, and a server that shows them. An async context manager."""

    name = "Prometheus"
    errors: tuple[type[Exception], ...] = ()

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._key = read_token(plan.run_dir, METRICS_KEY)
        self._rollout, self._values = -1, dict[str, float]()
        self._engines: Sequence[EngineClient] = ()
        self._runner: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._rollout = max(self._rollout, step)
        self._values.update(values)

    def close(self) -> None:
        """Nothing is buffered."""

    def follow(self, engines: Sequence[EngineClient]) -> None:
        """Show these engines' pages too."""
        self._engines = engines

    async def __aenter__(self) -> Exposition:
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        listener = socket.create_server((_LOOPBACK, 0))
        await web.SockSite(self._runner, listener).start()
        run, key = Path(self._plan.run_dir), token_path(self._plan.run_dir, METRICS_KEY)
        labels = {"run": self._plan.run_name, "host": socket.gethostname()}
        text = scrape_config(_LOOPBACK, listener.getsockname()[1], str(key), labels)
        write_file(run / SCRAPE_FILE, text, mode=PRIVATE)
        return self

    async def __aexit__(self, *_: object) -> None:
        (Path(self._plan.run_dir) / SCRAPE_FILE).unlink(missing_ok=True)
        await self._runner.cleanup()

    async def _answer(self, request: Any) -> Any:
        from aiohttp import web

        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            return web.Response(status=401, text="the key of this run is missing\n")
        pages = await asyncio.gather(*map(_page_of, self._engines))
        engines = {number: text for number, text in enumerate(pages) if text}
        nodes = [usage for usage in await asyncio.to_thread(read_usage, self._plan.run_dir) if usage.fresh]
        return web.Response(text=page(self._rollout, self._values, nodes, engines), content_type="text/plain")


async def _page_of(engine: EngineClient) -> str:
    """An engine's page; empty if it does not answer, which is found out elsewhere."""
    try:
        async with asyncio.timeout(_ENGINE_SECONDS):
            return await engine.metrics()
    except (EngineError, TimeoutError):
        return ""
