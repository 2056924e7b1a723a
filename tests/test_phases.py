import pytest

from pgl.phases import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_inner_phases_stop_the_outer_one():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.start("train", counts=True)
    clock.time = 5.0
    with timer.measure("validate"):
        clock.time = 7.5
    clock.time = 8.0
    timer.stop("train")
    clock.time = 100.0
    assert timer.seconds("train") == 5.5
    assert timer.seconds("validate") == 2.5
    assert timer.phases["train"].counts
    assert not timer.phases["validate"].counts


def test_seconds_of_an_open_phase_are_up_to_date():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.start("train")
    clock.time = 3.0
    assert timer.seconds("train") == 3.0
    assert timer.seconds("never entered") == 0.0


def test_saved_time_is_carried_over():
    clock = Clock()
    before = PhaseTimer(clock)
    with before.measure("train", counts=True):
        clock.time = 4.0
    after = PhaseTimer(clock)
    after.load_state_dict(before.state_dict())
    with after.measure("train", counts=True):
        clock.time = 5.0
    assert after.seconds("train") == 5.0
    assert after.phases["train"].entered == 2


def test_saved_phases_replace_what_was_measured_and_is_open():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.measure("train", counts=True):
        clock.time = 4.0
        saved = timer.state_dict()
        clock.time = 9.0
    with timer.measure("score"):
        clock.time = 10.0
    timer.start("train", counts=True)
    clock.time = 20.0
    timer.load_state_dict(saved)
    clock.time = 30.0
    assert timer.state_dict() == saved == {"train": [4.0, True, 1]}
    with timer.measure("train", counts=True):
        clock.time = 31.0
    assert timer.seconds("train") == 5.0


def test_a_phase_is_closed_when_its_block_raises():
    timer = PhaseTimer()
    with pytest.raises(RuntimeError, match="stop"), timer.measure("pack"):
        raise RuntimeError("stop")
    with timer.measure("pack"):
        pass
    assert timer.phases["pack"].entered == 2
