"""Weights out of real little folders: every layout, every slice, and every way a folder can be incomplete or wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmdeploy.checkpoint.source import FolderSource, open_source
from lmdeploy.errors import CheckpointError

A = torch.arange(48, dtype=torch.float32).view(12, 4)
B = torch.arange(6, dtype=torch.float32) / 7
TENSORS = {"model.a.weight": A, "model.b.weight": B}


def write(folder: Path, layout: str) -> Path:
    """The two tensors in one of the layouts that a folder can have."""
    first, second = {"model.a.weight": A}, {"model.b.weight": B}
    if layout == "single":
        save_file(TENSORS, folder / "model.safetensors")
    elif layout == "shards":
        save_file(first, folder / "model-00001-of-00002.safetensors")
        save_file(second, folder / "model-00002-of-00002.safetensors")
    elif layout == "indexed":
        save_file(first, folder / "one.safetensors")
        save_file(second, folder / "two.safetensors")
        write_index(folder, {"model.a.weight": "one.safetensors", "model.b.weight": "two.safetensors"})
    elif layout == "bin":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    elif layout == "old bin":
        torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif layout == "bin shards":
        torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
        torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
        write_index(folder, {"model.a.weight": "pytorch_model-00001-of-00002.bin", "model.b.weight": "pytorch_model-00002-of-00002.bin"}, "pytorch_model.bin")
    return folder


def write_index(folder: Path, weight_map: object, stem: str = "model.safetensors") -> None:
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS = ["single", "shards", "indexed", "bin", "old bin", "bin shards"]


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path, request.param)


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    opened = open_source(write(tmp_path, "single"))
    assert isinstance(opened, FolderSource)
    return opened


def test_every_layout_gives_the_same_tensors(folder: Path) -> None:
    source = open_source(folder)
    assert source.names() == set(TENSORS)
    assert (source.shape("model.a.weight"), source.dtype("model.a.weight")) == ((12, 4), torch.float32)
    assert source.has("model.b.weight")
    assert not source.has("model.c.weight")
    for name, value in TENSORS.items():
        out = torch.empty_like(value)
        source.take(name, out, shape=value.shape)
        assert torch.equal(out, value)
    source.finish()


def test_a_taken_tensor_can_be_taken_again_after_its_file_was_closed(folder: Path) -> None:
    source = open_source(folder)
    for name in [*TENSORS, *TENSORS]:
        out = torch.empty_like(TENSORS[name])
        source.take(name, out)
        assert torch.equal(out, TENSORS[name])


def test_take_copies_the_slice_and_casts(folder: Path) -> None:
    source = open_source(folder)
    out = torch.empty(3, 2, dtype=torch.bfloat16)
    source.take("model.a.weight", out, slice(4, 7), slice(1, 3))
    assert torch.equal(out, A[4:7, 1:3].bfloat16())
    bias = torch.empty(2)
    source.take("model.b.weight", bias, slice(4, None))
    assert torch.equal(bias, B[4:])


@pytest.mark.parametrize("ranges", [[(0, 2), (4, 6), (8, 10)], [(0, 1), (5, 8)], [(6, 9), (0, 3)], [(2, 2), (3, 4)], [(0, 12)], [(0, 4), (4, 8), (8, 12)]])
@pytest.mark.parametrize("cols", [None, slice(1, 3)])
def test_take_ranges_puts_row_ranges_one_after_the_other(source: FolderSource, ranges: list[tuple[int, int]], cols: slice | None) -> None:
    expected = torch.cat([A[a:b, cols or slice(None)] for a, b in ranges])
    out = torch.full((expected.shape[0] + 2, expected.shape[1]), -1.0)
    source.take_ranges("model.a.weight", out[1:-1], [slice(a, b) for a, b in ranges], cols)
    assert torch.equal(out[1:-1], expected)
    assert (out[[0, -1]] == -1).all()


def test_fused_qkv_is_split_as_its_view_says(tmp_path: Path) -> None:
    kv_heads, group, head_dim, width = 4, 3, 8, 16
    fused = torch.randn(kv_heads * (group + 2) * head_dim, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"wqkv": fused}, tmp_path / "model.safetensors")
    step = (group + 2) * head_dim
    out = torch.empty(kv_heads * group * head_dim, width)
    open_source(tmp_path).take_ranges("wqkv", out, [slice(k * step, k * step + group * head_dim) for k in range(kv_heads)])
    assert torch.equal(out, fused.view(kv_heads, group + 2, head_dim, width)[:, :group].reshape(-1, width).float())


def test_copies_larger_than_a_chunk_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdeploy.checkpoint.source.CHUNK_BYTES", 1 << 16)
    big = torch.randn(1000, 257, generator=torch.Generator().manual_seed(2))
    save_file({"big": big, "small": torch.ones(3)}, tmp_path / "model.safetensors")
    torch.save({"big": big, "small": torch.ones(3)}, tmp_path / "x.bin")
    (tmp_path / "bin").mkdir()
    (tmp_path / "x.bin").rename(tmp_path / "bin" / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "bin"):
        source = open_source(place)
        for _ in range(2):  # the second time the pages were given back
            out = torch.empty(500, 100)
            source.take("big", out, slice(300, 800), slice(7, 107))
            assert torch.equal(out, big[300:800, 7:107])
            whole = torch.empty_like(big)
            source.take("big", whole)
            assert torch.equal(whole, big)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    out = torch.empty(())
    source.take("scalar", out)
    assert out == 2.5
    source.take("empty", torch.empty(0, 4))
    source.finish()


def message(call: object, *args: object, **named: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **named)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_shapes_name_tensor_file_and_both_shapes(source: FolderSource) -> None:
    for text in (
        message(source.take, "model.a.weight", torch.empty(12, 5)),
        message(source.take, "model.a.weight", torch.empty(12, 5), slice(0, 12)),
        message(source.take, "model.a.weight", torch.empty(12, 5), shape=(12, 5)),
        message(source.take_ranges, "model.a.weight", torch.empty(12, 5), [slice(0, 6), slice(6, 12)]),
    ):
        assert all(part in text for part in ("model.a.weight", "model.safetensors", "[12, 4]", "[12, 5]")), text
    assert "[12, 4]" in message(source.take, "model.a.weight", torch.empty(2, 4), slice(11, 13))
    assert "columns" in message(source.take, "model.a.weight", torch.empty(12, 1), None, slice(4, 5))
    assert "columns" in message(source.take, "model.b.weight", torch.empty(6, 1), None, slice(0, 1))


def test_a_larger_tensor_than_config_json_says_is_not_silently_cut(source: FolderSource) -> None:
    assert "config.json asks for [6, 4]" in message(source.take, "model.a.weight", torch.empty(6, 4), slice(0, 6), shape=(6, 4))


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    save_file({"q": torch.ones(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    assert "int32 where bfloat16" in message(open_source(tmp_path).take, "q", torch.empty(4, 4, dtype=torch.bfloat16))


def test_quantised_weights_are_called_so(tmp_path: Path) -> None:
    save_file({"q.qweight": torch.ones(4, 4, dtype=torch.int32), "k.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert "quantised ('q.qweight')" in message(source.take, "q.weight", torch.empty(4, 4))
    assert "float8_e4m3fn where bfloat16" in message(source.take, "k.weight", torch.empty(4, 4, dtype=torch.bfloat16))


def test_a_missing_tensor_names_the_nearest(source: FolderSource) -> None:
    text = message(source.take, "model.a.wieght", torch.empty(1))
    assert "'model.a.wieght' is missing" in text
    assert "model.a.weight" in text


def test_names_from_a_file_cannot_break_out_of_the_line(tmp_path: Path) -> None:
    save_file({"evil\n\x1b[2J": B}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    for text in (message(source.finish), message(source.take, "evil", torch.empty(6)), message(source.take, "evil\n\x1b[2J", torch.empty(7))):
        assert "evil\\n\\x1b" in text


def test_a_source_can_be_closed_while_a_view_is_held(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, "single"))
    assert isinstance(source, FolderSource)
    held = source._file_of["model.a.weight"].tensor("model.a.weight")
    source.close()
    assert torch.equal(held, A)


def test_finish_lists_what_was_left_over_but_not_known_buffers(tmp_path: Path) -> None:
    save_file({"kept": B, "odd": B + 1, "layers.0.rotary_emb.inv_freq": B + 2, "lm_head.weight": B + 3}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    source.take("kept", torch.empty(6))
    text = message(source.finish, ignore=("lm_head.*",))
    assert "1 tensors" in text
    assert "'odd' (model.safetensors)" in text
    source.take("odd", torch.empty(6))
    source.finish(ignore=("lm_head.*",))


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    write(tmp_path, "single")
    torch.save({"other": B}, tmp_path / "pytorch_model.bin")
    assert open_source(tmp_path).names() == set(TENSORS)


def test_training_leftovers_and_second_copies_are_not_weights(tmp_path: Path) -> None:
    write(tmp_path, "shards")
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    assert open_source(tmp_path).names() == set(TENSORS)
    other = tmp_path / "bin"
    other.mkdir()
    write(other, "bin").joinpath("pytorch_model.bin").rename(other / "weights.bin")
    torch.save({"x": 1}, other / "training_args.bin")
    assert open_source(other).names() == set(TENSORS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, "shards")
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is missing; 1 of 2" in message(open_source, tmp_path)
    (tmp_path / "i").mkdir()
    write(tmp_path / "i", "indexed")
    (tmp_path / "i" / "two.safetensors").unlink()
    assert "two.safetensors is missing" in message(open_source, tmp_path / "i")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    assert "in both a.safetensors and b.safetensors" in message(open_source, tmp_path)


def test_no_weights_says_what_is_there(tmp_path: Path) -> None:
    assert "the folder is empty" in message(open_source, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "found config.json" in message(open_source, tmp_path)
    assert "no such folder" in message(open_source, tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..\\secret.safetensors", "C:\\x.safetensors", "", "a\0b"]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    write_index(inside, {"model.a.weight": name})
    assert "leads out of the model folder" in message(open_source, inside)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file(TENSORS, blobs / "0123")
    (snapshot / "part.safetensors").symlink_to("../blobs/0123")
    write_index(snapshot, dict.fromkeys(TENSORS, "part.safetensors"))
    assert open_source(snapshot).names() == set(TENSORS)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100000])
def test_a_broken_index_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "index.json" in message(open_source, tmp_path)


def test_an_index_that_lies_about_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "indexed")
    write_index(tmp_path, {"model.a.weight": "two.safetensors"})
    assert "'model.a.weight' should be in 'two.safetensors'" in message(open_source, tmp_path)


def test_tensors_that_the_index_forgot_are_found_by_finish(tmp_path: Path) -> None:
    write(tmp_path, "indexed")
    save_file({"model.a.weight": A, "extra": B}, tmp_path / "one.safetensors")
    source = open_source(tmp_path)
    for name, value in TENSORS.items():
        source.take(name, torch.empty_like(value))
    assert "'extra' (one.safetensors)" in message(source.finish)


MEASURE = """
import sys, torch
from pathlib import Path
from lmdeploy.checkpoint.source import open_source
def peak():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1024
source = open_source(Path(sys.argv[1]))
outs = {n: torch.zeros(source.shape(n), dtype=torch.bfloat16) for n in sorted(source.names())}
[t.fill_(1) for t in outs.values()]
before = peak()
for name, out in outs.items():
    source.take(name, out)
source.finish()
print(peak() - before, sum(float(t[-1, -1]) for t in outs.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_300_mb_needs_no_second_copy(tmp_path: Path, kind: str) -> None:
    tensors = {"one": torch.full((100_000, 1024), 2.0, dtype=torch.bfloat16), "two": torch.full((50_000, 1024), 3.0, dtype=torch.bfloat16)}
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=100, check=True)
    grown, total = map(float, result.stdout.split())
    assert total == 5.0
    assert grown < 40, f"loading 293 MiB took {grown} MiB beyond the weights"
