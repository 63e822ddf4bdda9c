"""Framing and messages between the two processes: what is sent arrives, what is not a message is refused."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine import wire
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, MemoryBill, SamplingParams, StepOutputs, TokenLogprobs

BILL = MemoryBill(
    device="cpu", weights=1, kv_pool=2, workspace=3, other=4, total=10, free=5, num_blocks=6, block_size=64, bytes_per_token=7, session_len=8, note="n"
)
INFO = EngineInfo(session_len=8, vocab_size=9, max_batch_size=2, memory=BILL, kernels={"attention": "cpu"}, dtype="float32", start_seconds=0.5)
REQUEST = EngineRequest(
    request_id=3,
    token_ids=[1, 2, 2**31],
    sampling=SamplingParams(max_new_tokens=4, stop_token_ids=(2, 5), bad_words=((1, 2), (3,)), logit_bias={7: -100.0}),
    n=2,
)
OUTPUT = EngineOutput(
    request_id=3, index=1, token_ids=[5], logprobs=[TokenLogprobs(5, -0.5, [(5, -0.5), (6, -1.5)])], finish_reason="stop", stop_token_id=5, num_generated=1
)


@pytest.fixture
def pair() -> Iterator[tuple[wire.Channel[wire.ToParent], wire.Channel[wire.ToChild], socket.socket]]:
    ours, theirs = socket.socketpair()
    parent, child = wire.to_child(ours), wire.to_parent(theirs)
    yield parent, child, theirs
    parent.close()
    child.close()


@pytest.mark.parametrize(
    "message",
    [wire.Start("/m", "pytorch", {"tp": 1, "dtype": "float32"}, "INFO"), wire.Submit(REQUEST), wire.Abort(3), wire.GetStats(9), wire.Stop()],
    ids=repr,
)
def test_what_the_parent_sends_arrives_unchanged(message: wire.ToChild, pair: tuple) -> None:
    parent, child, _ = pair
    parent.send(message)
    assert child.receive() == message


@pytest.mark.parametrize(
    "message",
    [
        wire.Ready(INFO),
        wire.Failed("ConfigError", "no"),
        wire.Outputs(StepOutputs([3], [1], [5], [OUTPUT, OUTPUT])),
        wire.Stats(4, EngineStats(running=2)),
    ],
    ids=repr,
)
def test_what_the_child_sends_arrives_unchanged(message: wire.ToParent, pair: tuple) -> None:
    parent, child, _ = pair
    child.send(message)
    assert parent.receive() == message


def test_a_message_that_arrives_in_pieces_is_put_together(pair: tuple) -> None:
    parent, _, raw = pair
    body = msgspec.msgpack.encode(wire.Failed("EngineError", "x" * 1000))
    data = struct.pack("!I", len(body)) + body

    def dribble() -> None:
        for i in range(0, len(data), 7):
            raw.sendall(data[i : i + 7])

    thread = threading.Thread(target=dribble)
    thread.start()
    assert parent.receive() == wire.Failed("EngineError", "x" * 1000)
    thread.join()


def test_a_closed_peer_ends_the_messages(pair: tuple) -> None:
    parent, child, _ = pair
    child.send(wire.Failed("EngineError", "last words"))
    child.close()
    assert parent.receive() is not None
    assert parent.receive() is None


@pytest.mark.parametrize(
    "data, problem",
    [
        (struct.pack("!I", wire.MAX_FRAME + 1), "the limit is"),
        (b"\x00\x00", "in the middle"),
        (struct.pack("!I", 10) + b"abc", "after 3 of 10 bytes"),
        (struct.pack("!I", 3) + b"\xc1\xc1\xc1", "invalid message"),
        (struct.pack("!I", 1) + b"\x80", "invalid message"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes, problem: str, pair: tuple) -> None:
    parent, _, raw = pair
    raw.sendall(data)
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(wire.WireError, match=problem):
        parent.receive()


@pytest.mark.parametrize("payload", [{"type": "Evil"}, {"type": "Abort", "request_id": 1}, {"type": "Stats", "ticket": "one", "stats": {}}, [1, 2], "Ready"])
def test_wrong_types_and_foreign_messages_are_refused(payload: object, pair: tuple) -> None:
    parent, _, raw = pair
    body = msgspec.msgpack.encode(payload)
    raw.sendall(struct.pack("!I", len(body)) + body)
    with pytest.raises(wire.WireError, match="invalid message"):
        parent.receive()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_decode_or_raise_a_wire_error(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    parent = wire.to_child(ours)
    try:
        theirs.sendall(struct.pack("!I", len(body)) + body)
        try:
            message = parent.receive()
        except wire.WireError:
            return
        assert isinstance(message, (wire.Ready, wire.Failed, wire.Outputs, wire.Stats))
    finally:
        parent.close()
        theirs.close()


def test_many_threads_may_send_at_once(pair: tuple) -> None:
    parent, child, _ = pair
    threads = [threading.Thread(target=lambda n=n: [parent.send(wire.Abort(n * 1000 + i)) for i in range(200)]) for n in range(8)]
    for thread in threads:
        thread.start()
    seen = [child.receive().request_id for _ in range(1600)]
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(n * 1000 + i for n in range(8) for i in range(200))


def test_a_message_beyond_the_limit_is_not_sent(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, _, _ = pair
    monkeypatch.setattr(wire, "MAX_FRAME", 100)
    with pytest.raises(wire.WireError, match="exceeds the limit of 100"):
        parent.send(wire.Submit(EngineRequest(request_id=1, token_ids=list(range(1000)), sampling=SamplingParams(max_new_tokens=1))))
