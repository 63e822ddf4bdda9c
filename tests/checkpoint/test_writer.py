"""Shards, index, and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch

from lmdeploy.checkpoint.source import open_source
from lmdeploy.checkpoint.writer import ShardWriter


def test_what_is_written_is_read_again_from_shards_of_bounded_size(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10, 10), float(i)) for i in range(7)}
    writer = ShardWriter(tmp_path / "out", shard_bytes=1000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    assert not (tmp_path / "out").exists()
    writer.commit()
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    source = open_source(tmp_path / "out")
    for name, tensor in tensors.items():
        source.take(name, out := torch.empty(10, 10))
        assert torch.equal(out, tensor)
    source.finish()
    assert not (tmp_path / ".out.partial").exists()


def test_a_view_is_written_without_the_tensor_that_it_is_part_of(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out")
    writer.add("part", torch.zeros(1000, 100)[:, :1])
    writer.finish()
    writer.commit()
    assert (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_size < 5000


def test_discarding_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    writer = ShardWriter(tmp_path / "out")
    writer.add("t", torch.zeros(3))
    writer.discard()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_the_rest_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    killed = ShardWriter(tmp_path / "out")
    killed.add("t", torch.zeros(3))
    killed.leave()
    (tmp_path / ".out.partial" / "model-00001-of-00002.safetensors").write_bytes(b"rest")
    writer = ShardWriter(tmp_path / "out")
    writer.add("t", torch.zeros(3))
    writer.finish()
    writer.commit()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
