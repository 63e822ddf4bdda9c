"""Until when masks may be waited for: what is learnt from steps, on a clock of our own."""

from __future__ import annotations

from math import inf

import pytest

from lmdeploy.engine import device_pace
from lmdeploy.engine.device_pace import EARLIER, DevicePace

DEVICE, HOST = 0.002, 0.0003


class Clock:
    """Seconds that pass when told so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(device_pace, "perf_counter", clock)
    return clock


def step(pace: DevicePace, clock: Clock, device: float = DEVICE, wait: float = 0.001, host: float = HOST, waited: bool = True, late: bool = False) -> None:
    """Tokens come, masks are there after `wait`, the choice is launched after `host`, and the next step at once; tokens come when the device is done with both."""
    pace.begins(waited)
    begun = clock.now
    pace.end()
    clock.now += wait
    pace.ends_wait()
    clock.now += host
    pace.launched(clock.now < begun + device, late)
    pace.goes_on()
    clock.now = max(clock.now, begun + device)


def learnt(clock: Clock) -> DevicePace:
    """After as many steps as it takes."""
    pace = DevicePace()
    for _ in range(20):
        step(pace, clock)
    return pace


def guess(pace: DevicePace, clock: Clock) -> float:
    """For how long masks are waited for, from the moment when the device begins."""
    pace.begins(True)
    return pace.end() - clock.now


def test_masks_are_waited_for_until_the_host_needs_the_rest_of_the_devices_step(clock: Clock) -> None:
    pace = learnt(clock)
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)


def test_before_anything_is_known_there_is_no_guess(clock: Clock) -> None:
    pace = DevicePace()
    assert pace.end() == inf
    pace.begins(True)
    assert pace.end() == inf


def test_where_the_device_waited_for_the_host_the_time_of_a_step_tells_nothing(clock: Clock) -> None:
    pace = learnt(clock)
    for _ in range(20):
        step(pace, clock, wait=0.03)  # rows that may not be late
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)


def test_a_device_that_waited_for_the_host_begins_with_what_is_launched_then_and_not_when_its_tokens_are_looked_at(clock: Clock) -> None:
    pace = learnt(clock)
    step(pace, clock, wait=0.03)
    launched = clock.now
    clock.now += 0.0007  # the tokens of the step before are there long since when somebody asks for them
    pace.begins(False)
    assert pace.end() == pytest.approx(launched + DEVICE - HOST, abs=1e-4)


def test_tokens_that_came_while_the_host_was_elsewhere_came_when_it_was_thought_that_they_would(clock: Clock) -> None:
    pace = learnt(clock)
    pace.begins(True)
    begun = clock.now
    clock.now += 0.001
    pace.ends_wait()
    pace.launched(True, False)  # the device was at work
    pace.goes_on()
    clock.now += 0.0015  # for half a millisecond nobody has asked
    pace.begins(False)
    assert pace.end() == pytest.approx(begun + DEVICE + DEVICE - HOST, abs=2e-4)
    for _ in range(20):
        step(pace, clock, device=0.0004, wait=0.0001, waited=False)  # of which nothing is learnt
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)


def test_a_host_that_always_comes_after_the_tokens_does_not_take_the_device_for_quicker_than_it_is(clock: Clock) -> None:
    """The device takes a quarter longer than it did: nothing says so, but the time when each step was launched."""
    pace = learnt(clock)
    for _ in range(40):
        pace.begins(False)
        begun = clock.now
        pace.end()
        clock.now += 0.001
        pace.ends_wait()
        clock.now += HOST
        pace.launched(True, False)
        pace.goes_on()
        clock.now = begun + DEVICE * 1.25
    pace.begins(False)
    assert DEVICE / 5 < pace.end() - clock.now <= DEVICE - HOST


def test_behind_a_step_of_which_nothing_is_known_nothing_is_guessed(clock: Clock) -> None:
    pace = learnt(clock)
    pace.forget()
    pace.ends_wait()
    pace.launched(True, False)
    pace.goes_on()
    clock.now += 0.0004
    pace.begins(False)  # its tokens came before anybody asked
    assert pace.end() == inf


def test_the_wait_ends_earlier_after_masks_were_given_up_too_late_and_takes_it_back_bit_by_bit(clock: Clock) -> None:
    pace = learnt(clock)
    for number in range(1, 6):
        step(pace, clock, wait=DEVICE - HOST + 0.00002, late=True)  # a moment too long: the device has waited
        assert guess(pace, clock) == pytest.approx(DEVICE - HOST - number * EARLIER, abs=1e-5)
    for _ in range(400):
        step(pace, clock)
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)


def test_a_host_that_comes_too_late_for_any_wait_does_not_shorten_the_next_ones(clock: Clock) -> None:
    pace = learnt(clock)
    for _ in range(10):
        pace.begins(True)
        clock.now += DEVICE  # the host is elsewhere
        pace.end()
        clock.now += 0.00003
        pace.ends_wait()
        clock.now += HOST
        pace.launched(False, True)
        pace.goes_on()
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)


def test_the_guess_follows_a_device_that_takes_longer_and_one_that_is_found_idle(clock: Clock) -> None:
    pace = learnt(clock)
    for _ in range(20):
        step(pace, clock, device=0.004)
    assert guess(pace, clock) == pytest.approx(0.004 - HOST, rel=0.02)
    clock.now += 0.001
    pace.idle()
    assert guess(pace, clock) == pytest.approx(0.001 - HOST, rel=0.02)


def test_a_device_that_is_found_idle_before_it_was_ever_waited_for_tells_how_long_it_takes(clock: Clock) -> None:
    """Else steps whose masks take longer than the device would wait for them for ever."""
    pace = DevicePace()
    pace.begins(True)
    clock.now += 0.0015
    pace.idle()
    assert guess(pace, clock) == pytest.approx(0.0015)


def test_pauses_and_steps_without_grammars_between_are_no_steps(clock: Clock) -> None:
    pace = DevicePace()
    for pause in range(20):
        step(pace, clock)
        clock.now += 3600 if pause % 2 else 0.05
        if pause % 2 == 0:
            pace.forget()
            assert pace.end() == inf
    step(pace, clock)
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)
