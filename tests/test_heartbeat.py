"""A rank that is silent, or has failed, is named by those that would wait for it."""

import time

import pytest

from pgl.heartbeat import Beat, Heartbeats


def pair(timeout_seconds: float) -> tuple[Heartbeats, Heartbeats, list[str]]:
    """Return rank 0, watching, and rank 1, which shows nothing by itself."""
    said: list[str] = []
    first = Heartbeats("127.0.0.1", None, 0, 2, timeout_seconds, said.append)
    second = Heartbeats("127.0.0.1", first.port, 1, 2, timeout_seconds, said.append)
    return first, second, said


def wait_for(said: list[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_silent_rank_ends_the_others_after_the_timeout():
    first, _, said = pair(0.5)
    first.step = 7
    started = time.monotonic()
    first.start()
    wait_for(said, 10)
    assert 0.5 <= time.monotonic() - started < 5
    assert said[0].startswith("rank 0 ends: rank 1 died or lost its connection: no sign of life")
    assert "(rank 0: step 7, rank 1: step 0)" in said[0]


def test_the_end_of_the_store_is_the_silence_of_rank_zero():
    first, second, said = pair(0.5)
    del first
    second.start()
    wait_for(said, 10)
    assert "rank 0 died" in said[0]


def test_a_rank_that_failed_is_quoted():
    first, second, said = pair(1.0)
    second.start()
    second.fail("ShardError: x.bin was deleted")
    first.start()
    wait_for(said, 10)
    assert said == ["rank 0 ends: rank 1 failed with ShardError: x.bin was deleted"]


def test_ranks_that_show_signs_of_life_are_left_alone():
    first, second, said = pair(3.0)
    first.start()
    second.start()
    assert first.explain() is None
    first.stop()
    second.stop()
    assert not said


def test_a_rank_that_has_finished_is_not_missed():
    first, second, said = pair(0.3)
    second.start()
    second.stop()
    first.start()
    time.sleep(1.0)
    assert not said
    assert first.beats[1].finished
    first.stop()


def test_an_explanation_waits_for_a_rank_that_was_heard_from_just_now():
    first, second, _ = pair(5.0)
    first.start()
    second._show(Beat(1, 3))
    assert "rank 1 died" in first.explain()
    first.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_steps_of_all_ranks_are_named(rank):
    first, second, _ = pair(5.0)
    second._show(Beat(1, 3))
    first.start()
    time.sleep(2.5)
    assert f"rank {rank}: step {(0, 3)[rank]}" in first.steps()
    first.stop()
