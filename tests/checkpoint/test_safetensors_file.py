"""Hostile and damaged `.safetensors` files: each is refused with one line, before anything is mapped, and no good file is."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lmdeploy.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from lmdeploy.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (object or raw text) and data, and perhaps a lie about the header's length."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d not in (torch.uint16, torch.uint32, torch.uint64)])
def test_every_dtype_of_the_format_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    save_file({"x": value}, tmp_path / "f.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert (file.shape("x"), file.dtype("x"), file.names()) == ((2, 3), dtype, ["x"])
    assert torch.equal(file.tensor("x").view(torch.uint8), value.view(torch.uint8))


def test_a_truncated_file_names_the_tensor_and_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(4), "z": torch.ones(100, 10)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    text = refusal(path)
    assert all(part in text for part in ("'z'", "4000 bytes", "3000 are there", "truncated"))


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_cut_inside_its_header_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(4)}, path)
    path.write_bytes(path.read_bytes()[:size])
    refusal(path)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**63, 200_000_000])
def test_a_hostile_header_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    assert f"{length} bytes" in refusal(write(tmp_path / "f.safetensors", {"a": entry()}, b"\0" * 8, length))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("NaN", "NaN is not a JSON number"),
        ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', "Infinity"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("[]", "not an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ({"a": 1}, "not an object"),
        ({"a": entry(dtype="F33")}, "unknown dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(shape=[-2])}, "shape [-2]"),
        ({"a": entry(shape=[2.0])}, "shape [2.0]"),
        ({"a": entry(shape=[True, 2])}, "shape [True, 2]"),
        ({"a": entry(shape="2")}, "shape '2'"),
        ({"a": entry(shape=[1] * 9)}, "shape [1, 1"),
        ({"a": entry(shape=[2**61, 8])}, "needs"),
        ({"a": entry(shape=[2**70])}, "shape [1180591620717411303424]"),
        ({"a": entry(offsets=[8, 0])}, "data_offsets [8, 0]"),
        ({"a": entry(offsets=[-8, 0])}, "data_offsets [-8, 0]"),
        ({"a": entry(offsets=[0, 8, 16])}, "data_offsets [0, 8, 16]"),
        ({"a": entry(offsets=None)}, "data_offsets None"),
        ({"a": entry(shape=[3])}, "needs 12 bytes, but its data_offsets span 8"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "inside tensor 'a'"),
        ({"a": entry(), "b": entry()}, "inside tensor 'a'"),
        ({"a": entry(offsets=[4, 12])}, "belong to no tensor"),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "belong to no tensor"),
        ({}, "belong to no tensor"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: Any, words: str) -> None:
    text = refusal(write(tmp_path / "f.safetensors", header, b"\0" * 12))
    assert words in text


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    header = {"a": entry("U8", [3], [0, 3]), "b": entry("F32", [2], [3, 11])}
    path = write(tmp_path / "f.safetensors", header, bytes([1, 2, 3]) + struct.pack("<2f", 1.5, -2.0))
    assert SafetensorsFile(path).tensor("b").clone().tolist() == [1.5, -2.0]


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(4096)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(CheckpointError, match="shrank"):
        file.tensor("a")


SHAPES = st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3)
OFFSETS = st.lists(st.integers(-1, 40) | st.just(2**63), min_size=0, max_size=3)
ENTRIES = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "U8", "X"]), "shape": SHAPES, "data_offsets": OFFSETS}) | st.none() | st.integers()


@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.integers(0, 40), st.integers(-3, 3))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_exactly_or_refused(tmp_path: Path, header: dict[str, Any], data: int, lie: int) -> None:
    path = write(tmp_path / "f.safetensors", header, bytes(range(data)), max(0, len(json.dumps(header)) + lie))
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    reference = load_file(path)  # what we accept, the format's own reader accepts too, with the same content
    assert set(reference) == set(file.names())
    for name, value in reference.items():
        assert torch.equal(file.tensor(name).reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    file.close()


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_never_escapes_as_another_exception(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
        for name in file.names():
            file.tensor(name).clone()
    except CheckpointError as error:
        assert str(path) in str(error)
