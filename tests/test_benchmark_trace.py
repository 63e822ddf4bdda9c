"""The arithmetic and the picture of `benchmark.trace`; its steps need a CUDA device (tests/gpu/test_trace.py)."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

from benchmark import trace
from benchmark.trace import Traced


@dataclass(frozen=True)
class Event:
    """What the profiler hands out."""

    kind: str
    start: int  # microseconds
    length: int
    label: str

    def device_type(self) -> str:
        return f"DeviceType.{self.kind}"

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start * 1000

    def duration_ns(self) -> int:
        return self.length * 1000


def steps(count: int) -> list[Event]:
    """Steps of 1 ms: the host plans, launches and waits; two kernels overlap, and the device rests 100 us. In the order of nothing."""
    events = []
    for at in range(5000, 5000 + 1000 * count, 1000):
        events += [
            Event("CUDA", at, 500, "void nvjet_tst_64x8"),
            Event("CUDA", at + 400, 500, "_decode_kernel"),
            Event("CPU", at, 20, "host: plan"),
            Event("CPU", at + 20, 60, "host: launch"),
            Event("CUDA", at + 20, 60, "host: launch"),  # the profiler's shadow of it on the device
            Event("CPU", at + 30, 5, "aten::copy_"),
            Event("CPU", at + 80, 900, "host: wait"),
        ]
    return events[::-1]


@pytest.fixture
def traced() -> Traced:
    return Traced(step=1e-3, host=8e-5, parts={}, spans=trace._spans(steps(10)), steps=10)


def test_kernels_and_the_hosts_parts_are_told_from_all_else(traced: Traced) -> None:
    assert {span.name for span in traced.spans if span.device} == {"void nvjet_tst_64x8", "_decode_kernel"}
    assert [span.name for span in traced.spans if not span.device][:3] == ["plan", "launch", "wait"]
    assert traced.spans[0].begin == 0 and traced.kernels == 2


def test_time_in_which_kernels_overlap_counts_once(traced: Traced) -> None:
    assert traced.busy == pytest.approx((10 * 900) / (10 * 1000 - 100))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_decode_kernel", "attention"),
        ("_rows_kernel", "products"),
        ("_async_kernel", "products"),
        ("nvjet_tst_128x64", "products"),
        ("_rms_norm_kernel", "norms"),
        ("_silu_mul_kernel", "SiLU"),
        ("_choose_kernel", "choice of tokens"),
        ("Memcpy HtoD (Pinned -> Device)", "other"),
    ],
)
def test_a_kernels_name_says_what_it_is_for(name: str, kind: str) -> None:
    assert trace.kind_of(name) == kind


def test_the_picture_shows_some_steps_of_both(traced: Traced) -> None:
    picture = ElementTree.fromstring(trace.draw(traced, "7B & 1 < 2", steps=2))
    text = "".join(picture.itertext())
    assert "7B & 1 < 2" in text and "launch: 60 us" in text and "_decode_kernel: 500 us" in text
    assert "attention 500 us" in text and "wait 900 us" in text  # sums of a step
    boxes = list(picture.iter("{http://www.w3.org/2000/svg}rect"))
    assert all(0 <= float(box.get("x", 0)) <= 1200 and float(box.get("x", 0)) + float(box.get("width", 0)) <= 1201 for box in boxes)


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["trace"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"none here.*host_loop"):
        trace.main()
