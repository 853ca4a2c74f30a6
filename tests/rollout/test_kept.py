"""Rollouts kept between their generation and the checkpoint that holds what was learnt from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vime.rollout.kept import MOST_KEPT, KeptRollouts
from vime.run.checkpoints import TRACKER
from vime.samples import Group, Rollout, Sample, Status, Turn

FLOATS = some.floats(allow_nan=False, allow_infinity=False)


@some.composite
def samples(draw: some.DrawFn) -> Sample:
    count = draw(some.integers(0, 5))
    numbers = some.lists(some.integers(0, 2**31 - 1), min_size=count, max_size=count)
    sample = Sample(
        draw(some.integers(0, 99)),
        draw(some.integers(0, 3)),
        draw(some.text() | some.just([{"role": "user", "content": "1 + 1"}])),
        draw(some.lists(some.integers(0, 99))),
        label=draw(some.text() | some.none()),
        response_ids=draw(numbers),
        log_probs=draw(some.lists(FLOATS, min_size=count, max_size=count)),
        weight_versions=draw(some.lists(some.integers(-1, 99), min_size=count, max_size=count)),
        loss_mask=draw(some.lists(some.integers(0, 1), min_size=count, max_size=count)),
        response=draw(some.text()),
        reward=draw(FLOATS | some.none()),
        status=draw(some.sampled_from(Status)),
    )
    if draw(some.booleans()):
        sample.teacher_log_probs = draw(some.lists(FLOATS, min_size=count, max_size=count))
    if count > 1:
        sample.turns = [Turn("model", 0, 1, "a", "stop"), Turn("tool", 1, count, "b")]
    return sample


def rollout_of(rollout_id: int, every: list[Sample]) -> Rollout:
    groups: dict[int, Group] = {}
    for sample in every:
        groups.setdefault(sample.group_index, Group(sample.group_index, [])).samples.append(sample)
    return Rollout(rollout_id, list(groups.values()), {"rollout/raw_reward": 0.1 + 0.2})


@pytest.fixture
def kept(tmp_path: Path) -> KeptRollouts:
    (tmp_path / "plan.json").write_text("{}")
    return KeptRollouts(tmp_path, tmp_path / "checkpoints")


def save(tmp_path: Path, rollout_id: int) -> None:
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / TRACKER).write_text(str(rollout_id))


@settings(deadline=None)
@given(every=some.lists(samples(), max_size=5))
def test_a_rollout_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, every: list[Sample]) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "plan.json").write_text("{}")
    kept, rollout = KeptRollouts(run, run / "checkpoints"), rollout_of(3, every)
    kept.write(rollout, {"next_group": 7})
    found = kept.read(3)
    assert found is not None
    assert (found.rollout, found.sampler) == (rollout, {"next_group": 7})


def test_what_a_checkpoint_holds_is_removed_and_the_rest_stays(tmp_path: Path, kept: KeptRollouts) -> None:
    for number in range(3):
        kept.write(rollout_of(number, []), {})
    save(tmp_path, 1)
    kept.write(rollout_of(3, []), {})
    assert [number for number in range(4) if kept.read(number) is not None] == [2, 3]


def test_only_a_bounded_number_is_kept_behind_a_checkpoint(tmp_path: Path, kept: KeptRollouts) -> None:
    save(tmp_path, 4)
    for number in (5, 4 + MOST_KEPT, 5 + MOST_KEPT):
        kept.write(rollout_of(number, []), {})
    assert kept.read(4 + MOST_KEPT) is not None
    assert kept.read(5 + MOST_KEPT) is None


def test_a_rollout_that_may_have_ended_the_run_is_given_once(kept: KeptRollouts) -> None:
    for number in range(4):
        kept.write(rollout_of(number, []), {})
    for _ in range(2):
        given = [number for number in range(4) if kept.read(number) is not None]
    assert given == [0, 1]


def test_another_plan_generates_its_own(tmp_path: Path, kept: KeptRollouts) -> None:
    kept.write(rollout_of(0, []), {})
    (tmp_path / "plan.json").write_text('{"temperature": 2}')
    assert kept.read(0) is None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn"])
def test_a_damaged_file_is_named_and_not_used(
    tmp_path: Path, kept: KeptRollouts, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    kept.write(rollout_of(0, []), {})
    path = next(tmp_path.rglob("*.npz"))
    path.write_bytes(damage)
    assert kept.read(0) is None
    assert str(path) in capsys.readouterr().out


def test_values_that_json_cannot_hold_cost_only_the_copy(
    tmp_path: Path, kept: KeptRollouts, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.write(rollout_of(0, [Sample(0, 0, object(), [])]), {})
    assert kept.read(0) is None
    assert not list(tmp_path.rglob("*.npz"))
    assert "rollout 0 is not kept" in capsys.readouterr().out


def test_a_run_without_checkpoints_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    KeptRollouts(tmp_path, None).write(rollout_of(0, []), {})
    assert not (tmp_path / "rollouts").exists()


def test_the_file_is_private(tmp_path: Path, kept: KeptRollouts) -> None:
    kept.write(rollout_of(0, []), {})
    path = next(tmp_path.rglob("*.npz"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
