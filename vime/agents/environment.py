"""Environments: what a conversation is held with, for those who think in `reset` and `step`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vime.rollout.chat import Message
from vime.rollout.session import Reply, Session
from vime.samples import Sample


@dataclass(frozen=True)
class Step:
    """Reaction of an environment to a turn of the model."""

    messages: Sequence[Message] = ()
    """Observation that the model gets before its next turn."""
    done: bool = False
    reward: float | None = None
    """Reward of this turn; a conversation's is their sum. Without any, `--rm-type` grades it."""


class Environment:
    """One conversation's environment, made anew for each. Subclass it and name it with `--environment`."""

    tools: ClassVar[Sequence[dict[str, Any]]] = ()
    """JSON schemas of the tools that the model may call; then the engine's parser finds the calls in its turns."""
    session: Session
    """The conversation; set before `reset`. `with self.session.tool(name)` measures the use of a tool."""

    async def reset(self, sample: Sample) -> Sequence[Message] | None:
        """Begin. Returns the messages that the conversation starts with, or None for the data set's prompt."""
        return None

    async def step(self, message: Message) -> Step:
        """Answer a turn of the model: a message with `content`, and with `tool_calls` where it calls tools."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    async def close(self) -> None:
        """Free what it holds. Called once, also after a failure."""

    def state_dict(self) -> dict[str, Any] | None:
        """State behind the last step as plain values, for a conversation that is aborted and goes on later; None where
        it cannot be told, so that the conversation begins again."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, instead of `reset`."""


async def hold(session: Session, environment: Environment) -> None:
    """Hold a conversation with an environment, from its beginning or from where it was aborted."""
    environment.session = session
    try:
        await _steps(session, environment)
    finally:
        # Also where the round is over: what a sandbox holds is freed before anything else happens.
        await asyncio.shield(environment.close())


async def _steps(session: Session, environment: Environment) -> None:
    sample, reward = session.sample, None
    reply: Reply | None = None
    if sample.environment is not None:
        environment.load_state_dict(sample.environment["state"])
        reward, reply = sample.environment["reward"], session.last_reply
    elif (messages := await environment.reset(sample)) is not None:
        session.start(messages, environment.tools)
    _keep_state(session, environment, reward)
    while True:
        reply = reply or await session.generate()
        step = await environment.step(await _message(session, environment, reply))
        reply = None
        if step.reward is not None:
            reward = (reward or 0.0) + step.reward
        sample.reward = reward
        if step.done:
            return
        session.give(step.messages)
        _keep_state(session, environment, reward)


def _keep_state(session: Session, environment: Environment, reward: float | None) -> None:
    state = environment.state_dict()
    session.sample.environment = None if state is None else {"state": state, "reward": reward}


async def _message(session: Session, environment: Environment, reply: Reply) -> Message:
    if environment.tools:
        return await session.message(reply, environment.tools)
    return {"role": "assistant", "content": reply.text}
