"""Functions and environments that tests load as `agent_plugins:name` to hold conversations."""

import asyncio
import os
import time

from vime.agents.environment import Environment, Step
from vime.samples import Status


async def asks_twice(session, sample):
    await session.generate()
    session.give([{"role": "user", "content": f"sure about {sample.label}?"}])
    await session.generate()


async def goes_on(session, sample):
    while session.sampled_turns < 3 or session.last_reply is None:
        await session.generate()
        if session.sampled_turns < 3:
            session.give([{"role": "user", "content": "on"}])


goes_on.resumes = True


async def with_a_branch(session, sample):
    await session.generate()
    side = session.branch([{"role": "user", "content": "aside"}])
    await side.generate()
    side.give([{"role": "user", "content": "more"}])
    await side.generate()
    session.give([{"role": "user", "content": "back"}])
    await session.generate()
    sample.reward = 0.5


async def fails_on_seven(session, sample):
    await session.generate()
    if sample.label == "7":
        raise ValueError("seven")


async def marks_seven(session, sample):
    await session.generate()
    if sample.label == "7":
        sample.status = Status.FAILED


async def swallows(session, sample):
    try:
        while True:
            await session.generate()
            session.give([{"role": "user", "content": "on"}])
    except Exception:  # noqa: BLE001, S110 -- the point of the test
        pass


async def dies_on_seven(session, sample):
    await session.generate()
    if sample.label == "7":
        os._exit(3)


async def blocks_on_seven(session, sample):
    await session.generate()
    if sample.label == "7":
        time.sleep(3600)  # noqa: ASYNC251 -- the point of the test


async def always_fails(session, sample):
    raise ValueError("never works")


def not_async(session, sample):
    pass


class Guess(Environment):
    """Tells the model whether its number is too low; three tries."""

    def __init__(self):
        self.tries = 0

    async def reset(self, sample):
        self.label = sample.label
        return [{"role": "user", "content": f"guess {sample.label}"}]

    async def step(self, message):
        self.tries += 1
        with self.session.tool("scale"):
            await asyncio.sleep(0.001)
        right = message["content"] == self.label
        if right or self.tries == 3:
            return Step(done=True, reward=1.0 if right else -1.0)
        return Step([{"role": "user", "content": f"no, try {self.tries}"}], reward=0.25)

    def state_dict(self):
        return {"tries": self.tries, "label": self.label}

    def load_state_dict(self, state):
        self.tries, self.label = state["tries"], state["label"]


class Forgetful(Guess):
    """The same, but its state cannot be told."""

    def state_dict(self):
        return None


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: The number.
    """
    if number == 13:
        raise ValueError("unlucky")
    return 2 * number


def undocumented(number):
    return number


async def by_client(session, sample):
    from openai import AsyncOpenAI

    from vime.agents.endpoint import endpoint

    messages = [{"role": "user", "content": sample.prompt}]
    async with endpoint(session) as model, AsyncOpenAI(base_url=f"{model.url}/v1", api_key=model.key) as client:
        for question in ("sure?", None):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            if question:
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                messages.append({"role": "user", "content": question})
        await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "aside"}])
    sample.reward = 0.25
