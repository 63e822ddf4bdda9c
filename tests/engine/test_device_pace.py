"""Until when masks may be waited for: what is learnt from steps, on a clock of our own."""

from __future__ import annotations

from math import inf

import pytest

from lmdeploy.engine import device_pace
from lmdeploy.engine.device_pace import DevicePace

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


def step(pace: DevicePace, clock: Clock, device: float = DEVICE, wait: float = 0.001, host: float = HOST, waited: bool = True) -> None:
    """Tokens come, masks are there after `wait`, the choice is launched after `host`; tokens come again when the device is done with both."""
    pace.begins(waited)
    begun = clock.now
    clock.now += wait
    pace.ends_wait()
    clock.now += host
    pace.launched(clock.now < begun + device)
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


def test_tokens_that_were_there_long_since_tell_nothing_of_the_device(clock: Clock) -> None:
    pace = learnt(clock)
    for _ in range(20):
        step(pace, clock, device=0.0005, wait=0.0001, host=HOST, waited=False)
        pace.begins(False)
        pace.idle()
    for _ in range(20):
        step(pace, clock)
        clock.now += 0.01  # the host is elsewhere
        pace.begins(False)
    step(pace, clock, device=0.0005, wait=0.0001, waited=False)  # the host waits for its tokens, but had not for those before
    assert guess(pace, clock) == pytest.approx(DEVICE - HOST, rel=0.01)


def test_the_guess_follows_a_device_that_takes_longer_and_one_that_is_found_idle(clock: Clock) -> None:
    pace = learnt(clock)
    for _ in range(20):
        step(pace, clock, device=0.004)
    assert guess(pace, clock) == pytest.approx(0.004 - HOST, rel=0.02)
    clock.now += 0.001
    pace.idle()
    assert guess(pace, clock) == pytest.approx(0.001 - HOST, rel=0.02)


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
