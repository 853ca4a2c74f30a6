"""One conversation on one seat: turns that the model samples, and what it is given between them.

One module since a session's turns, tools and branches change the same sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from vime.errors import BadInput, DataError, VimeError
from vime.rollout.chat import ChatTemplate, Message
from vime.rollout.client import SamplingSettings
from vime.rollout.dispatch import Dispatcher, RoundFull, Seat
from vime.rollout.routes import RouteBook
from vime.samples import MODEL, UNVERSIONED, Sample, Status, ToolUse, Turn

_LONG = 512
"""Longer turns are decoded in a thread, off the event loop."""
GIVEN_IDS = "ids"
"""Role of a turn of given token ids."""


class ConversationOver(Exception):
    """The conversation takes no more turns. What holds it has to let this pass."""


class Aborted(ConversationOver):
    """The round is full; the conversation may go on in the next one."""


class BudgetSpent(ConversationOver):
    """No turns, tokens or time are left; the text says which."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the conversation has no {what} left")
        self.what = what


class Agent(Protocol):
    """Holds conversations, one a call."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools that prompts tell of."""
        ...

    async def __call__(self, session: Session) -> None:
        """Hold a conversation from its prompt to its end, or on from where it was aborted."""
        ...

    def resumes(self, sample: Sample) -> bool:
        """Whether an aborted conversation can go on; one that cannot begins again."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        ...


class SingleTurn:
    """One answer and no more: what training does without an agent."""

    tools: Sequence[Mapping[str, Any]] = ()

    async def __call__(self, session: Session) -> None:
        await session.generate()

    def resumes(self, sample: Sample) -> bool:
        return True

    def take_metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Budget:
    """Limits of a conversation; the settings and the engines' context limit its tokens."""

    turns: int = 1
    """Turns that the model may sample."""
    turn_tokens: int | None = None
    """Tokens of one turn; None: as many as the conversation has left."""
    turn_seconds: float | None = None
    seconds: float | None = None
    """Time of the whole conversation."""


@dataclass
class Counts:
    """Counts over all conversations since the last look."""

    suffixes: int = 0
    divergent: int = 0
    spent: dict[str, int] = field(default_factory=dict)
    """Conversations that ended by a limit, by what was spent."""

    def take(self) -> Counts:
        """The counts so far, which start again at 0."""
        taken = replace(self, spent=dict(self.spent))
        self.suffixes = self.divergent = 0
        self.spent.clear()
        return taken


@dataclass
class Settings:
    """State shared by all conversations of a run or an evaluation."""

    dispatcher: Dispatcher
    template: ChatTemplate
    sampling: SamplingSettings
    context_length: int
    """Tokens of prompt and response together that the engines take."""
    deadline_s: float
    """Time of one request to an engine."""
    budget: Budget = field(default_factory=Budget)
    seed: int | None = None
    """Base seed, combined with the sample's index; None: unseeded."""
    divergence: Literal["count", "refuse"] = "count"
    """Whether a conversation may go on where the template would have written its history otherwise."""
    counts: Counts = field(default_factory=Counts)
    routes: RouteBook | None = None
    """Takes the experts that the engines chose for every token."""


@dataclass(frozen=True)
class Reply:
    """One turn of the model."""

    token_ids: list[int]
    text: str
    """Without special tokens."""
    finish: str
    """`stop`, or `length` where the turn's tokens ran out."""


class Session:
    """One conversation. Everything goes into its sample as it happens; of one event loop.

    `generate` samples a turn, `give` adds what the model is told before the next one. Neither ever changes a token that
    is there. Sub-agents and compacted histories are branches, which share the conversation's seat and reward.
    """

    def __init__(self, sample: Sample, seat: Seat, settings: Settings) -> None:
        self.sample, self.settings = sample, settings
        self.over: BaseException | None = None
        """Why the conversation takes no more turns."""
        self.branches: list[Session] = []
        self.tokens = 0
        """Tokens sampled by this session and its branches."""
        self._seat = seat
        self._pending: list[Message] = []
        self._began = asyncio.get_running_loop().time()
        if sample.response_ids and not sample.turns:
            sample.turns = [Turn(MODEL, 0, len(sample.response_ids), sample.response)]

    @property
    def turns(self) -> list[Turn]:
        """All turns so far, sampled and given ones."""
        return self.sample.turns

    @property
    def sampled_turns(self) -> int:
        """Turns that the model has begun."""
        return [turn.role for turn in self.turns].count(MODEL)

    @property
    def room(self) -> int:
        """Tokens that the conversation may still get."""
        longest = min(self.settings.sampling.max_tokens, self.settings.context_length - len(self.sample.prompt_ids))
        return longest - len(self.sample.response_ids)

    @property
    def last_reply(self) -> Reply | None:
        """The model's turn, if it is whole and nothing was given behind it: where an aborted conversation goes on."""
        turn = self.turns[-1] if self.turns else None
        return self._reply(turn) if turn is not None and turn.sampled and turn.finish else None

    def start(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Begin with these messages instead of the data set's prompt. Raises BadInput once the model has spoken."""
        if self.turns or self._pending:
            raise BadInput("a conversation can be started anew only before its first turn")
        if self.sample.data_prompt is None:
            self.sample.data_prompt = (self.sample.prompt, self.sample.prompt_ids)
        self.sample.prompt = [dict(message) for message in messages]
        self.sample.prompt_ids = self.settings.template.prompt(messages, tools)

    def give(self, what: Sequence[int] | Sequence[Message]) -> None:
        """Add token ids as they are, or chat messages, which the template renders before the next turn.

        Messages given one after another are rendered as one step. Raises BadInput for ids behind such messages.
        """
        self._check()
        if not what:
            return
        if isinstance(what[0], int):
            if self._pending:
                raise BadInput("give either token ids or messages between two turns of the model")
            try:
                self._append([int(token) for token in what], GIVEN_IDS)  # type: ignore[arg-type]
            except BudgetSpent as error:
                raise self._end(error) from None
            return
        if not self.turns:
            raise BadInput("the model has not spoken yet: begin with other messages by session.start")
        self._pending.extend(what)  # type: ignore[arg-type]

    async def generate(self, max_tokens: int | None = None, stop: Sequence[str] = ()) -> Reply:
        """The model's next turn, or the rest of one that was aborted.

        Raises ConversationOver where there is no next turn: the round is full, or a budget is spent.
        """
        self._check()
        try:
            return await self._turn(max_tokens, stop)
        except RoundFull:
            raise self._end(Aborted("the round is full")) from None
        except (ConversationOver, VimeError) as error:
            raise self._end(error) from None

    async def message(self, reply: Reply, tools: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """A turn as a chat message, with `tool_calls` and `reasoning` as the engine's own parsers find them."""
        self._check()
        token_ids = reply.token_ids
        if token_ids and token_ids[-1] in self.settings.template.stops:
            token_ids = token_ids[:-1]  # the parsers keep special tokens, and the end is no part of the message
        if not token_ids:
            return {"role": "assistant", "content": ""}
        try:
            return await self.settings.dispatcher.parse(self._seat, token_ids, tools)
        except RoundFull:
            raise self._end(Aborted("the round is full")) from None
        except VimeError as error:
            raise self._end(error) from None

    @contextlib.contextmanager
    def tool(self, name: str) -> Iterator[ToolUse]:
        """Measures the use of a tool; what runs inside sets `error` where the tool failed."""
        use = ToolUse(name)
        self.sample.tools.append(use)
        started = time.monotonic()
        try:
            yield use
        except Exception as error:
            use.error = use.error or type(error).__name__
            raise
        finally:
            use.seconds = time.monotonic() - started

    def branch(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Session:
        """Another line of the same conversation, which begins with messages of its own and shares the reward."""
        self._check()
        sample = self.sample.without_response()
        sample.branch = len(self.branches) + 1
        session = Session(sample, self._seat, self.settings)
        session._began = self._began
        session.start(messages, tools)
        self.branches.append(session)
        return session

    def restart(self) -> None:
        """Forget all turns, for a conversation whose process died by the fault of another one."""
        if self.settings.routes is not None:
            self.settings.routes.forget(self.sample)
        self.sample.restart()
        self.branches.clear()
        self._pending.clear()

    def finish(self) -> None:
        """Set the status and the answer of a conversation that has ended by itself or by a budget."""
        sample = self.sample
        last = next((turn for turn in reversed(self.turns) if turn.sampled), None)
        if sample.status == Status.FAILED:
            return
        cut = isinstance(self.over, BudgetSpent) or (last is not None and last.finish == "length")
        sample.status = Status.FAILED if last is None and not cut else Status.TRUNCATED if cut else Status.COMPLETED
        sample.response = last.text if last else ""
        for branch in self.branches:
            branch.finish()

    @property
    def ends_at(self) -> float | None:
        """When the conversation's time is over, by the event loop's clock; None without a limit."""
        seconds = self.settings.budget.seconds
        return None if seconds is None else self._began + seconds

    def expire(self) -> None:
        """End the conversation because its time is over. Raises BudgetSpent."""
        raise self._end(BudgetSpent("time"))

    def _check(self) -> None:
        if self.over is not None:
            raise self.over

    def _end(self, error: Exception) -> Exception:
        self.over = error
        if isinstance(error, BudgetSpent):
            spent = self.settings.counts.spent
            spent[error.what] = spent.get(error.what, 0) + 1
        return error

    async def _turn(self, max_tokens: int | None, stop: Sequence[str]) -> Reply:
        goes_on = bool(self.turns) and self.turns[-1].sampled and not self.turns[-1].finish
        if not goes_on:
            if self.sampled_turns >= self.settings.budget.turns:
                raise BudgetSpent("turns")
            self._render_pending()
        done = len(self.sample.response_ids) - self.turns[-1].start if goes_on else 0
        limits = [self.room + done, max_tokens, self.settings.budget.turn_tokens]
        left = min(limit for limit in limits if limit is not None) - done
        if left <= 0 and goes_on and self.room > 0:
            self.turns[-1].finish = "length"
            return self._reply(self.turns[-1])
        if left <= 0:
            raise BudgetSpent("tokens")
        await self._sample(goes_on, left, stop)
        return self._reply(self.turns[-1])

    def _reply(self, turn: Turn) -> Reply:
        return Reply(self.sample.response_ids[turn.start : turn.end], turn.text, turn.finish)

    async def _sample(self, goes_on: bool, left: int, stop: Sequence[str]) -> None:
        """Ask the engine for at most `left` tokens of the turn."""
        sample, shared = self.sample, self.settings
        sampling = replace(shared.sampling, stop=(*shared.sampling.stop, *stop)) if stop else shared.sampling
        seconds = self._seconds_left()
        call = shared.dispatcher.generate(
            self._seat,
            sample.prompt_ids + sample.response_ids,
            sampling,
            max_tokens=left,
            deadline_s=shared.deadline_s,
            seed=None if shared.seed is None else request_seed(shared.seed, sample),
            routes=None if shared.routes is None else shared.routes.ask(sample),
        )
        if seconds is None:
            generated = await call
        else:
            try:
                async with shared.dispatcher.clock(seconds):
                    generated = await call
            except TimeoutError:
                raise BudgetSpent("time") from None
        start = len(sample.response_ids)
        if shared.routes is not None and generated.routes is not None:
            shared.routes.add(sample, generated.routes)
        generated.append_to(sample)
        sample.status = Status.ABORTED  # until the conversation has ended, whatever ends it
        if not goes_on:
            self.turns.append(Turn(MODEL, start, start))
        turn = self.turns[-1]
        turn.end = len(sample.response_ids)
        self.tokens += len(generated.token_ids)
        turn.text = sample.response = await self._text(sample.response_ids[turn.start : turn.end])
        if generated.finish_reason == "abort":
            raise Aborted("the round is full")
        turn.finish = generated.finish_reason

    def _seconds_left(self) -> float | None:
        budget = self.settings.budget
        if budget.seconds is None:
            return budget.turn_seconds
        rest = budget.seconds - (asyncio.get_running_loop().time() - self._began)
        if rest <= 0:
            raise BudgetSpent("time")
        return rest if budget.turn_seconds is None else min(rest, budget.turn_seconds)

    def _render_pending(self) -> None:
        if not self._pending:
            return
        sample = self.sample
        last = next(turn for turn in reversed(self.turns) if turn.sampled)
        suffix = self.settings.template.suffix(
            self._pending, last_id=sample.response_ids[-1], thought="</think>" in last.text
        )
        counts = self.settings.counts
        counts.suffixes += 1
        counts.divergent += suffix.diverges
        if suffix.diverges and self.settings.divergence == "refuse":
            raise DataError(
                "the chat template writes a conversation's history otherwise once it goes on, so engine and template "
                "disagree: give --on-template-divergence count to train on what the engine saw"
            )
        roles = "+".join(dict.fromkeys(str(message["role"]) for message in self._pending))
        text = "\n".join(message["content"] for message in self._pending)
        self._pending = []
        self._append(suffix.token_ids, roles, text)

    def _append(self, token_ids: list[int], role: str, text: str | None = None) -> None:
        """Add given tokens. Raises BudgetSpent where there is no room for them and for one more that is sampled."""
        if len(token_ids) >= self.room:
            raise BudgetSpent("tokens")
        sample, start = self.sample, len(self.sample.response_ids)
        sample.response_ids += token_ids
        sample.log_probs += [0.0] * len(token_ids)
        sample.weight_versions += [UNVERSIONED] * len(token_ids)
        sample.loss_mask += [0] * len(token_ids)
        shown = self.settings.template.text(token_ids) if text is None else text
        self.turns.append(Turn(role, start, start + len(token_ids), shown))

    async def _text(self, token_ids: list[int]) -> str:
        text = self.settings.template.text
        return text(token_ids) if len(token_ids) < _LONG else await asyncio.to_thread(text, token_ids)


def request_seed(seed: int, sample: Sample) -> int:
    """Seed (56 bits) of a sample's next tokens, the same whenever and wherever the request is sent."""
    branch = f"/{sample.branch}" if sample.branch else ""
    text = f"{seed}/{sample.index}/{len(sample.response_ids)}{branch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
