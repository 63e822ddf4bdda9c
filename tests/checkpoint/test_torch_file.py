"""`.bin` files: tensors only, nothing is executed, damage is one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdeploy.checkpoint.torch_file import TorchFile
from lmdeploy.errors import CheckpointError


class Bomb:
    """Runs a command when an unsafe reader opens it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "pwned"
    torch.save({"a": torch.ones(2), "b": Bomb(target)}, path, _use_new_zipfile_serialization=zipped)
    assert "refused" in refusal(path)
    assert not target.exists()


def test_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "pwned"
    path.write_bytes(pickle.dumps(Bomb(target), protocol=2))
    refusal(path)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_one_line(tmp_path: Path, zipped: bool, keep: float) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    refusal(path)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"a": 1}, {1: torch.ones(2)}, {"state_dict": {"a": torch.ones(2)}}])
def test_only_a_table_of_tensors_is_a_checkpoint(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    assert "tensor" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_never_escapes_as_another_exception(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 9999))  # not the length itself: the old format writes addresses, so it differs from run to run
        raw[place * len(raw) // 10000] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = TorchFile(path)
        for name in file.names():
            file.tensor(name).clone()
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_shared_and_strided_tensors_are_read(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": base, "b": base.t(), "c": base[1]}, path)
    file = TorchFile(path)
    assert torch.equal(file.tensor("b"), base.t())
    file.drop_pages("a")
    assert torch.equal(file.tensor("c"), base[1])
