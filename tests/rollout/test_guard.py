"""No route of an engine answers without the key of the run."""

import pytest

from vime.rollout.guard import RequireKey


async def call(app, *headers, kind="http"):
    sent = []

    async def receive():
        return {}

    async def send(message):
        sent.append(message)

    await app({"type": kind, "path": "/pause", "headers": list(headers)}, receive, send)
    return sent


@pytest.fixture
def app(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv("VIME_SERVER_NAME", "mine")

    async def inner(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return RequireKey(inner)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"k")],
        [(b"authorization", b"Bearer kk")],
        [(b"authorization", b"Bearer k"), (b"authorization", b"Bearer x")],
    ],
)
async def test_other_keys_and_none_are_refused(app, headers):
    assert (await call(app, *headers))[0]["status"] == 401
    assert await call(app, *headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


async def test_the_key_opens_and_the_answer_names_the_server(app):
    (start,) = await call(app, (b"authorization", b"Bearer k"))
    assert start["status"] == 200
    assert start["headers"] == [(b"x-vime-server", b"mine")]


def test_a_server_without_a_key_does_not_start(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="open to everyone"):
        RequireKey(lambda *_: None)
