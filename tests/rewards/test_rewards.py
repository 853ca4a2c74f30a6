"""Rewards: what counts as right, and that no function, however bad, stops a run."""

import asyncio
import socket
import time
from dataclasses import replace

import pytest
from aiohttp import web

from tests.support import patience
from vime.errors import BadInput, DataError, VimeError
from vime.rewards import math_answer, text
from vime.rewards import scorer as scorer_module
from vime.rewards.filters import check_reward_nonzero_std
from vime.rewards.names import BuiltIn
from vime.rewards.scorer import Scorer, no_answer_warning
from vime.rewards.worker import answer
from vime.rollout.mixture import PromptHistory
from vime.samples import Group, Sample, Status


def sample(response="", label=None, index=0, **metadata):
    return Sample(index, 0, "?", [1], label=label, metadata=metadata, response=response, status=Status.COMPLETED)


@pytest.mark.parametrize(
    ("response", "label", "right"),
    [
        ("12", "12", True),
        (" 12 ", 12, True),
        ("13", "12", False),
        ("", "12", False),
        ("no idea", "12", False),
        ("The answer is 12.", "12", True),
        ("so it is \\boxed{12}", "12", True),
        ("first \\boxed{11}, then \\boxed{12}", "12", True),
        ("<think>it is \\boxed{12}</think> \\boxed{13}", "12", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{50\\%}", "1/2", True),
        ("1,234", "1234", True),
        ("x^2+1", "1+x^2", True),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}", True),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", True),
        ("\\boxed{x = 3}", "3", True),
        ("12", "\\boxed{12}", True),
    ],
)
def test_math_compares_values_not_spellings(response, label, right):
    assert math_answer.math(sample(response, label)) == float(right)


@pytest.mark.parametrize("response", ["5+7", "\\boxed{5+7}", "the answer is 5+7", "$24 - 12$", "3*4"])
def test_arithmetic_that_nobody_has_done_is_no_answer(response):
    assert math_answer.math(sample(response, "12")) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>…</think> so \\boxed{12}", 1.0),
        ("###Response \\boxed{12}", 1.0),
        ("<think>…</think> so 12", 0.0),
        ("<think>… \\boxed{12}", 0.0),
        ("\\boxed{12}", 0.0),
        ("</think> \\boxed{1{2}", 0.0),
    ],
)
def test_deepscaler_wants_a_box_after_the_thinking(response, reward):
    assert math_answer.deepscaler(sample(response, "12")) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [("bla\nAnswer: $12$", 1.0), ("Answer: 11\nAnswer: 12.", 1.0), ("12", -1.0), ("Answer: 12" + " x" * 300, -1.0)],
)
def test_dapo_reads_the_last_answer_line_and_punishes_the_rest(response, reward):
    assert math_answer.dapo(sample(response, "12")) == reward


def test_f1_is_the_overlap_of_words_with_the_best_reference():
    assert text.f1(sample("The cat sat", "a cat sat!")) == 1.0
    assert text.f1(sample("the cat", ["dog", "cat sat"])) == pytest.approx(2 / 3)
    assert text.f1(sample("bird", "cat")) == 0.0


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("Answer: C", "C", 1.0),
        ("the answer is (c)", "C", 1.0),
        ("\\boxed{\\text{B}}", "B", 1.0),
        ("A or B? B is wrong. Answer: A", 0, 1.0),
        ("I choose D.", "red", 0.0),
        ("Answer: B", "red", 1.0),
        ("nothing", "A", 0.0),
    ],
)
def test_gpqa_reads_the_chosen_letter(response, label, reward):
    assert text.gpqa(sample(response, label, choices=["blue", "red"])) == reward


def test_a_label_that_is_no_choice_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="neither a letter"):
        text.gpqa(sample("Answer: A", "green"))


def test_the_filter_keeps_groups_with_different_rewards():
    def group(*rewards):
        samples = [sample() for _ in rewards]
        for each, reward in zip(samples, rewards, strict=True):
            each.reward = reward
        return Group(0, samples)

    assert check_reward_nonzero_std(group(0.0, 1.0))
    assert not check_reward_nonzero_std(group(0.1, 0.1, 0.1))
    assert not check_reward_nonzero_std(group(1.0))


def sums(*labels):
    return Group(3, [sample(label, label, index=number) for number, label in enumerate(labels)])


async def test_the_built_in_functions_run_in_worker_processes():
    async with Scorer("math", limit_s=patience.MOMENT, workers=1) as scorer:
        group = Group(0, [sample("12", "12"), sample("x+1", "1+x"), sample("2", "3")])
        group.samples.append(sample("Answer: B", "B", rm_type="gpqa"))
        await scorer.score(group)
    assert [each.reward for each in group.samples] == [1.0, 1.0, 0.0, 1.0]


async def test_a_degenerate_answer_counts_as_wrong_and_costs_no_worker():
    async with Scorer("math", limit_s=patience.MOMENT, workers=1) as scorer:
        group = Group(0, [sample("9^{9^{9^{9^9}}}", "x+2"), sample("2+x", "x+2"), sample("7" * 5000, "7")])
        await scorer.score(group)
        assert [each.reward for each in group.samples] == [0.0, 1.0, 0.0]
        assert scorer.workers_replaced == 0


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("hangs_on_seven", "did not return within 0.2 s"),
        ("hangs_deaf", "was killed"),
        ("dies_on_seven", "died"),
        ("raises_on_seven", "LookupError: no seven here"),
    ],
)
async def test_a_plugin_that_fails_for_one_sample_fails_that_sample_by_name_and_no_other(function, what):
    async with Scorer(f"reward_plugins:{function}", limit_s=0.2, workers=1) as scorer:
        started = time.monotonic()
        group = sums("1", "7", "2", "3")
        await scorer.score(group)
        assert time.monotonic() - started < patience.MOMENT
        assert [each.reward for each in group.samples] == [1.0, None, 1.0, 1.0]
        assert group.samples[1].status == Status.FAILED
        assert "sample 1 of group 0" in scorer.first_failure
        assert what in scorer.first_failure
        assert scorer.take_metrics().items() >= {"rollout/reward_failures": 1.0, "rollout/reward_timeouts": 0.0}.items()


@pytest.mark.parametrize("function", ["always_raises", "not_finite"])
async def test_a_plugin_that_fails_for_too_many_samples_ends_the_run_with_the_first_failure(function):
    async with Scorer(f"reward_plugins:{function}", limit_s=patience.STUB, workers=1) as scorer:
        with pytest.raises(DataError, match="more than 10%; first: sample"):
            await scorer.score(sums(*"123456"))


async def test_slow_rewards_of_one_group_keep_no_other_group_waiting():
    async with Scorer("reward_plugins:hangs_on_seven", limit_s=patience.STUB, workers=2) as scorer:
        slow = asyncio.create_task(scorer.score(sums("7", "7", "7", "7")))
        await asyncio.sleep(0.1)
        other = Group(4, [replace(each, group_index=4) for each in sums("1", "2", "3", "4").samples])
        await scorer.score(other)
        assert not slow.done()
        assert [each.reward for each in other.samples] == [1.0] * 4
        slow.cancel()


async def test_what_a_plugin_prints_does_not_disturb_it(capfd):
    async with Scorer("reward_plugins:prints", limit_s=patience.STUB, workers=1) as scorer:
        group = sums("1", "2")
        await scorer.score(group)
    assert [each.reward for each in group.samples] == [1.0, 1.0]
    assert "this must not reach" in capfd.readouterr().err


@pytest.mark.parametrize("target", ["reward_plugins:missing", "no.such.module:f", "reward_plugins:os"])
async def test_a_plugin_that_cannot_be_loaded_is_bad_input_at_the_start(target):
    with pytest.raises(BadInput, match=target.replace(".", r"\.")):
        async with Scorer(target, limit_s=patience.STUB, workers=1):
            pass


async def test_a_call_given_up_by_its_caller_costs_no_worker():
    async with Scorer("reward_plugins:slow_on_odd", limit_s=patience.STUB, workers=1) as scorer:
        given_up = asyncio.create_task(scorer.score(sums("1")))
        await asyncio.sleep(0.05)
        given_up.cancel()
        group = sums("2")
        await scorer.score(group)
        assert group.samples[0].reward == 1.0
        assert scorer.workers_replaced == 0


class RewardServer:
    """A stub of a reward server: answers with what the list holds, in turn."""

    def __init__(self, *answers):
        self.answers, self.bodies = list(answers), []

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _answer(self, request):
        self.bodies.append(await request.json())
        answer = self.answers.pop(0)
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)


@pytest.mark.parametrize(
    ("answers", "reward"),
    [([0.5], 0.5), ([{"reward": 2}], 2.0), ([503, {"score": 1}], 1.0), ([400], None), (["?"], None)],
)
async def test_a_reward_server_is_asked_again_when_it_is_busy_but_not_when_it_refuses(answers, reward):
    async with (
        RewardServer(*answers) as server,
        Scorer("remote", rm_url=server.url, limit_s=patience.MOMENT, workers=1) as scorer,
    ):
        group = sums("4")
        await scorer.score(group)
    assert group.samples[0].reward == reward
    assert server.bodies[0] == {"prompt": "?", "response": "4", "label": "4", "metadata": {}}
    assert not server.answers


async def test_a_reward_server_that_is_away_is_waited_for_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr("vime.rewards.remote.FIRST_PAUSE_SECONDS", 0.01)
    answers = (*[503] * 5, 1.0, 1.0, 1.0, 1.0)
    async with (
        RewardServer(*answers) as server,
        Scorer("remote", rm_url=server.url, limit_s=patience.MOMENT, workers=1) as scorer,
    ):
        group = sums("1", "2", "3", "4")
        await scorer.score(group)
    assert [each.reward for each in group.samples] == [1.0] * 4
    assert [record.message.split(server.url)[1].split()[:2] for record in caplog.records] == [
        ["is", "away"], ["is", "back"],
    ]  # fmt: skip


async def test_a_reward_server_that_stays_away_ends_the_run_with_a_cause_that_requeues(monkeypatch):
    monkeypatch.setattr("vime.rewards.remote.FIRST_PAUSE_SECONDS", 0.01)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # a port that refuses: bound, and not listened on
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        async with Scorer("remote", rm_url=url, limit_s=patience.MOMENT, workers=1, patience_s=0.2) as scorer:
            with pytest.raises(VimeError, match=r"was away for 0.2 s \(--rm-patience\)") as caught:
                await scorer.score(sums("1", "2"))
    assert caught.value.cause.requeue_mends


async def test_a_built_in_grader_that_raises_on_a_response_means_a_wrong_answer(monkeypatch):
    broken = BuiltIn("reward_plugins:always_raises", -1.0)
    monkeypatch.setattr(scorer_module, "BUILT_IN", {"math": broken})
    async with Scorer("math", limit_s=patience.MOMENT, workers=1) as scorer:
        group = sums(*"123456")
        await scorer.score(group)
        assert [each.reward for each in group.samples] == [-1.0] * 6
        assert scorer.take_metrics().items() >= {"rollout/reward_errors": 6.0, "rollout/reward_failures": 0.0}.items()


async def test_a_built_in_grader_that_cannot_use_a_label_is_a_failure_and_no_zero():
    async with Scorer("gpqa", limit_s=patience.MOMENT, workers=1) as scorer:
        with pytest.raises(DataError, match="neither a letter"):
            await scorer.score(Group(0, [sample("A", "green", index=number) for number in range(8)]))


@pytest.mark.parametrize(("response", "share"), [("<think>a</think>\\boxed{1}", 0.0), ("\\boxed{1}", 1.0)])
async def test_responses_without_an_end_of_thinking_are_counted_for_deepscaler(response, share):
    async with Scorer("deepscaler", limit_s=patience.MOMENT, workers=1) as scorer:
        group = Group(0, [sample(response, "1", index=number) for number in range(4)])
        await scorer.score(group)
        assert scorer.take_metrics()["rollout/no_answer_share"] == share
        assert [each.reward for each in group.samples] == [1.0 - share] * 4
    assert "--rm-type math" in no_answer_warning("deepscaler")


def test_a_built_in_grader_may_not_fill_the_memory(monkeypatch):
    def fills(_):
        return len(bytearray(2**27))

    monkeypatch.setattr("vime.rewards.worker.MOST_BYTES_ADDED", 2**26)
    assert answer(fills, None, 60) == {"value": 2.0**27}
    monkeypatch.setattr(fills, "__module__", "vime.rewards.math_answer")
    assert answer(fills, None, 60) == {"error": "MemoryError"}


async def test_a_curriculum_runs_in_a_worker_and_a_bad_one_is_named():
    histories = [PromptHistory("a", 0, [1.0]), PromptHistory("a", 1, [0.0])]
    async with Scorer("math", limit_s=patience.MOMENT, workers=1, curriculum="reward_plugins:unsolved_first") as scorer:
        assert await scorer.chances(histories) == [0.25, 1.0]
    async with Scorer("math", limit_s=patience.MOMENT, workers=1, curriculum="reward_plugins:always_raises") as scorer:
        with pytest.raises(DataError, match=r"--curriculum: .*LookupError: never"):
            await scorer.chances(histories)
    with pytest.raises(BadInput, match="--curriculum easy is not a function"):
        Scorer("math", limit_s=patience.MOMENT, workers=1, curriculum="easy")
