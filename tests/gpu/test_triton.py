"""The Triton kernels on a CUDA device: attention, rope_write_kv, norms and silu_mul in the shapes of real models, against the reference. One command:
`pytest tests/gpu/test_triton.py -q -n 8 -k 'not times'` (a kernel is compiled for each variant), then `-k times`, which prints and has no bar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lmdeploy.kernels.kv_quant import dequantise_rows, quantise_rows
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import OPERATORS, select
from lmdeploy.kv_layer import KVFormat, KVLayer
from tests.kernels.paged import FORMATS, NOWHERE, Case, Sequence, Shape, error, numbers, paged_case, sequences

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
attention = pytest.importorskip("lmdeploy.kernels.triton_kernels.attention", reason="triton is not installed")
decode_direct = pytest.importorskip("lmdeploy.kernels.triton_kernels.decode_direct", reason="triton is not installed")
kv_write = pytest.importorskip("lmdeploy.kernels.triton_kernels.kv_write", reason="triton is not installed")

pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
TRITON = select("turbomind", "cuda", torch.bfloat16, head_dim=128)
DTYPES = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the largest result: one rounding of it, and one of the softmax weights
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_FORMAT = pytest.mark.parametrize("fmt", FORMATS)
#: one piece, several, as many as there may be; a fresh prompt, chunks in the middle and of two tokens
MIXED = sequences([(1, 1), (63, 1), (512, 1), (513, 1), (1100, 1), (8700, 1), (700, 700), (1500, 130), (2100, 2)])


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def agree(case: Case, window: int = 0, factor: float = 1.0) -> None:
    assert error(case.attend(TRITON, window), case.attend(REFERENCE, window)) <= factor * DTYPES[case.q.dtype]


def test_every_operator_with_a_kernel_was_chosen() -> None:
    assert "torch" not in TRITON.names.values()
    assert set(TRITON.names) == set(OPERATORS)


# ---- attention


@EACH_DTYPE
@EACH_FORMAT
def test_attention_of_a_mixed_step(dtype: torch.dtype, fmt: str) -> None:
    agree(paged_case(FORMATS[fmt], Shape(16, 4, 128, 64, dtype, "cuda"), MIXED))


@pytest.mark.parametrize("fmt", ["16", "k8v4", "4 rotated"])
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 256])
def test_attention_of_any_head_dim(fmt: str, head_dim: int) -> None:
    agree(paged_case(FORMATS[fmt], Shape(8, 2, head_dim, 64, torch.bfloat16, "cuda"), MIXED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_attention_of_other_types_and_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    agree(paged_case(FORMATS["k8v4"], Shape(8, 2, head_dim, 64, dtype, "cuda"), MIXED))


@pytest.mark.parametrize("window", [1, 100, 1024, 4000])
@pytest.mark.parametrize("fmt", ["16", "8", "4 rotated"])
def test_attention_in_a_window(window: int, fmt: str) -> None:
    agree(paged_case(FORMATS[fmt], Shape(8, 2, 128, 64, torch.bfloat16, "cuda"), MIXED), window)


def test_blocks_that_the_window_left_behind_are_not_read() -> None:
    case, window = paged_case(FORMATS["8"], Shape(8, 2, 128, 64, torch.bfloat16, "cuda"), sequences([(2000, 1), (900, 70)])), 100
    wanted = case.attend(REFERENCE, window)
    case.meta.block_table[0, : (2000 - window) // 64] = NOWHERE
    case.meta.block_table[1, : (900 - 69 - window) // 64] = NOWHERE
    assert error(case.attend(TRITON, window), wanted) <= DTYPES[torch.bfloat16]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (14, 2), (28, 4), (71, 1)])
@pytest.mark.parametrize("fmt", ["16", "k8v4"])
def test_attention_of_any_group(heads: int, kv_heads: int, fmt: str) -> None:
    agree(paged_case(FORMATS[fmt], Shape(heads, kv_heads, 64, 64, torch.bfloat16, "cuda"), MIXED))


@pytest.mark.parametrize("block_size", [1, 16, 48, 128])
def test_attention_of_any_block_size(block_size: int) -> None:
    agree(paged_case(FORMATS["8"], Shape(8, 2, 128, block_size, torch.float16, "cuda"), MIXED))


@pytest.fixture
def tiles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's sums have another order than those of the tiles."""
    monkeypatch.setattr(attention, "SHORTEST_PROMPT", 1 << 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "lengths", [[(700, 700)], [(1024, 1024)], [(300, 1), (4700, 1), (512, 512), (1500, 1500)]], ids=["alone", "alone in place", "beside decoding"]
)
def test_whole_prompts(lengths: list[tuple[int, int]], head_dim: int, dtype: torch.dtype) -> None:
    case = paged_case(FORMATS["16"], Shape(16, 4, head_dim, 64, dtype, "cuda"), sequences(lengths))
    case.q, case.key, case.value = torch.split(torch.cat([case.q, case.key, case.value], 1), [16, 4, 4], 1)  # parts of one buffer, as in a step
    assert attention._suits_cudnn(case.q, case.layer, case.meta, 0)
    agree(case)


@pytest.mark.usefixtures("tiles_only")
@EACH_DTYPE
@pytest.mark.parametrize("fmt", ["16", "8", "4 rotated"])
@pytest.mark.parametrize("window", [0, 300])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, fmt: str, window: int) -> None:
    shape = Shape(8, 2, 128, 64, dtype, "cuda")
    together = paged_case(FORMATS[fmt], shape, MIXED)
    found = together.attend(TRITON, window)
    assert torch.equal(together.attend(TRITON, window), found), "and again"
    for i, s in enumerate(MIXED):
        alone = paged_case(FORMATS[fmt], shape, [s], shuffle=i + 1).attend(TRITON, window)
        assert torch.equal(alone, found[together.rows(i)]), s


@EACH_DTYPE
@pytest.mark.parametrize("fmt", ["16", "8", "4 rotated", "fp8"])
@pytest.mark.parametrize("step", [5, 1])
@pytest.mark.parametrize("few", [0, 1 << 20], ids=["for many", "for few"])
def test_a_row_has_the_same_bits_among_many(dtype: torch.dtype, fmt: str, step: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of many rows have other shares and another pipeline; of very many, a program takes several pieces. (Kernels for few rows and for many have their own bits.)"""
    monkeypatch.setattr(decode_direct, "FEW", few)
    shape, batch = Shape(16, 4, 128, 64, dtype, "cuda"), [Sequence(n, 1, n) for n in (1, 300, 600, 2500, 9000, *range(1, 400, step))]
    case = paged_case(FORMATS[fmt], shape, batch)
    found = case.attend(TRITON)
    for i in (0, 1, 2, 3, 4, 40, 84):
        alone = paged_case(FORMATS[fmt], shape, [batch[i]], shuffle=i + 1)
        assert torch.equal(alone.attend(TRITON)[0], found[i]), batch[i]
        assert error(found[i], alone.attend(REFERENCE)[0]) <= DTYPES[dtype]


@pytest.mark.parametrize("fmt", ["8", "fp8", "4 rotated", "k8v4"])
@pytest.mark.parametrize("few", [0, 1 << 20], ids=["for many", "for few"])
def test_a_row_has_the_same_bits_among_many_in_one_launch_with_its_rotation(fmt: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it stores is the same."""
    monkeypatch.setattr(decode_direct, "FEW", few)
    shape, batch = Shape(16, 4, 128, 64, torch.bfloat16, "cuda"), [Sequence(n, 1, n) for n in (1, 300, 2500, 9000, *range(1, 400, 10))]
    qkv, angles = numbers(shape, 3, len(batch), 24, 128), 300 * torch.rand(len(batch), 64, device="cuda")

    def attend(rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        case = paged_case(FORMATS[fmt], shape, [batch[row] for row in rows], shuffle=rows[0])
        out = torch.full((len(rows), 16 * 128), float("nan"), dtype=torch.bfloat16, device="cuda")
        TRITON.rope_attention(*parts(shape, qkv[rows]), angles[rows].cos(), angles[rows].sin(), None, case.layer, case.meta, 128**-0.5, 0, out)
        last = [batch[row].length - 1 for row in rows]
        blocks = torch.tensor([int(case.meta.block_table[i, n // 64]) for i, n in enumerate(last)], device="cuda")
        caches = (case.layer.key, case.layer.value, case.layer.key_scales, case.layer.value_scales)
        return out, [cache.view(torch.uint8)[blocks, :, torch.tensor(last, device="cuda") % 64] for cache in caches if cache is not None]

    assert TRITON.rope_attention is not None
    found, stored = attend(list(range(len(batch))))
    for row in (0, 1, 2, 3, 4, 30, 43):
        out, own = attend([row])
        assert torch.equal(out[0], found[row]), batch[row]
        assert all(torch.equal(alone[0], among[row]) for alone, among in zip(own, stored, strict=True)), batch[row]


@pytest.mark.usefixtures("tiles_only")
@pytest.mark.parametrize("fmt", ["16", "8"])
def test_a_prompt_has_the_same_bits_in_any_chunks(fmt: str) -> None:
    shape = Shape(8, 2, 128, 64, torch.bfloat16, "cuda")
    whole = paged_case(FORMATS[fmt], shape, [Sequence(1500, 1500, 3)]).attend(TRITON)
    for start, end in ((0, 2), (2, 710), (710, 1401), (1401, 1500)):
        case = paged_case(FORMATS[fmt], shape, [Sequence(1500, 1500 - start, 3)])
        case.meta.query_start[1], case.meta.kv_lens[0] = end - start, end
        case.meta.query_lens[0], case.meta.kv_lens_host[0] = end - start, end
        assert torch.equal(case.attend(TRITON)[: end - start], whole[start:end]), (start, end)


def test_a_nan_reaches_its_own_sequence_only() -> None:
    case = paged_case(FORMATS["4"], Shape(8, 2, 128, 64, torch.bfloat16, "cuda"), MIXED)
    wanted = case.attend(TRITON)
    assert case.layer.key_scales is not None
    case.layer.key_scales[case.meta.block_table[4, 1].item(), 0, 3] = float("nan")
    found = case.attend(TRITON)
    assert found[4, : 4 * 128].isnan().all() and not found[4, 4 * 128 :].isnan().any()
    found[4] = wanted[4]
    assert torch.equal(found, wanted)


@EACH_DTYPE
@pytest.mark.parametrize("fmt", ["16", "8", "4", "fp8", "k8v4", "4 rotated"])
@pytest.mark.parametrize(("head_dim", "rope"), [(128, 128), (80, 32), (64, 0)])
def test_rope_and_attention_in_one_launch(dtype: torch.dtype, fmt: str, head_dim: int, rope: int) -> None:
    shape, batch = Shape(8, 2, head_dim, 64, dtype, "cuda"), [s for s in MIXED if s.new == 1]
    rows, case, other = len(batch), paged_case(FORMATS[fmt], shape, batch), paged_case(FORMATS[fmt], shape, batch)
    assert TRITON.rope_attention is not None and torch.equal(case.layer.key.view(torch.uint8), other.layer.key.view(torch.uint8))
    places = [int(case.meta.block_table[i, (s.length - 1) // 64]) * 64 + (s.length - 1) % 64 for i, s in enumerate(batch)]
    case.meta.slot_mapping = torch.tensor(places, device="cuda")
    qkv, angles = numbers(shape, 3, rows, 12, head_dim), 300 * torch.rand(rows, rope // 2, device="cuda")
    rotary = (angles.cos(), angles.sin(), None)
    found, wanted = (torch.full((rows, 8 * head_dim), float("nan"), dtype=dtype, device="cuda") for _ in range(2))
    TRITON.rope_attention(*parts(shape, qkv.clone()), *rotary, case.layer, case.meta, head_dim**-0.5, 0, found)
    q, k, v = parts(shape, qkv)
    TRITON.rope_write_kv(q, k, v, *rotary, other.layer, case.meta.slot_mapping)
    TRITON.attention(q, k, v, other.layer, case.meta, head_dim**-0.5, 0, wanted)
    if "rotated" in fmt or fmt == "k8v4":  # the rotation's sums have another order: a number that is stored may fall otherwise
        assert error(found, wanted) <= 0.1 and found.isfinite().all()
    else:
        assert torch.equal(case.layer.key.view(torch.uint8), other.layer.key.view(torch.uint8)) and torch.equal(found, wanted)


@pytest.mark.parametrize("fmt", ["16", "8", "4 rotated"])
def test_one_graph_serves_every_length(fmt: str) -> None:
    shape = Shape(8, 2, 128, 64, torch.bfloat16, "cuda")
    lengths = [[(70, 1), (300, 1), (40, 30), (1, 1)], [(5000, 1), (1, 1), (900, 1), (40, 30)], [(257, 1), (2049, 1), (31, 30), (600, 1)]]
    cases = [paged_case(FORMATS[fmt], shape, sequences(batch)) for batch in lengths]
    long = max(cases, key=lambda case: case.layer.key.shape[0])
    table = torch.full((4, 100), 0, dtype=torch.int32, device="cuda")
    q, out = torch.zeros_like(long.q), torch.zeros(long.q.shape[0], 1024, dtype=torch.bfloat16, device="cuda")
    memory = [
        torch.zeros_like(part) if part is not None else None for part in (long.layer.key, long.layer.value, long.layer.key_scales, long.layer.value_scales)
    ]
    layer = replace(long.layer, key=memory[0], value=memory[1], key_scales=memory[2], value_scales=memory[3])
    meta = replace(long.meta, kv_lens=long.meta.kv_lens.clone(), block_table=table, query_lens=[], kv_lens_host=[], workspace={})

    def put(case: Case) -> None:
        q.copy_(case.q)
        meta.kv_lens.copy_(case.meta.kv_lens)
        table[:, : case.meta.block_table.shape[1]] = case.meta.block_table
        for mine, its in zip(memory, (case.layer.key, case.layer.value, case.layer.key_scales, case.layer.value_scales), strict=True):
            if mine is not None and its is not None:
                mine[: its.shape[0]] = its

    put(cases[0])
    captured = Case(q, layer, meta, q, q)
    captured.attend(TRITON)
    meta.workspace.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        TRITON.attention(q, q, q, layer, meta, 128**-0.5, 0, out)
    for case in [*cases, *cases]:
        put(case)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, case.attend(TRITON))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [16, 32])
def test_a_row_alone_in_one_launch_with_its_rotation_has_smaller_pieces(heads: int, dtype: torch.dtype) -> None:
    shape = Shape(heads, 8, 128, 64, dtype, "cuda")
    for length in (1, 63, 64, 65, 128, 129, 1000, 5000, 16000):
        case, angles = paged_case(FORMATS["16"], shape, [Sequence(length, 1, length)]), 300 * torch.rand(1, 64, device="cuda")
        case.meta.slot_mapping[0] = int(case.meta.block_table[0, (length - 1) // 64]) * 64 + (length - 1) % 64
        qkv, rotary = numbers(shape, 3, 1, heads + 16, 128), (angles.cos(), angles.sin(), None)
        found, wanted = (torch.full((1, heads * 128), float("nan"), dtype=dtype, device="cuda") for _ in range(2))
        assert TRITON.rope_attention is not None
        TRITON.rope_attention(*parts(shape, qkv.clone()), *rotary, case.layer, case.meta, 128**-0.5, 0, found)
        q, k, v = parts(shape, qkv)
        TRITON.rope_write_kv(q, k, v, *rotary, case.layer, case.meta.slot_mapping)
        TRITON.attention(q, k, v, case.layer, case.meta, 128**-0.5, 0, wanted)
        assert error(found, wanted) <= DTYPES[dtype], length


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "rope"), [(16, 4, 128), (8, 2, 64), (8, 1, 128)])
def test_a_row_alone_between_products_of_whole_weights(heads: int, kv_heads: int, rope: int, dtype: torch.dtype) -> None:
    """Its own kernel: any length, in a window, and with its rotation in one launch, which changes no bit."""
    shape = Shape(heads, kv_heads, 128, 64, dtype, "cuda")
    for length in (1, 2, 17, 64, 128, 129, 130, 257, 1000, 5000, 16000):
        case = paged_case(FORMATS["16"], shape, [Sequence(length, 1, length)])
        usual = case.attend(TRITON)
        case.meta.whole_weights = True
        for window in (0, 1, 100):
            agree(case, window)
        assert (case.attend(TRITON) != usual).any() or length < 64, "it was not called"
        case.meta.slot_mapping[0] = int(case.meta.block_table[0, (length - 1) // 64]) * 64 + (length - 1) % 64
        qkv, angles = numbers(shape, 3, 1, heads + 2 * kv_heads, 128), 300 * torch.rand(1, rope // 2, device="cuda")
        rotary, outs = (angles.cos(), angles.sin(), torch.full((1,), 1.25, device="cuda")), [torch.full_like(usual, float("nan")) for _ in range(2)]
        assert TRITON.rope_attention is not None
        TRITON.rope_attention(*parts(shape, qkv.clone()), *rotary, case.layer, case.meta, 0.1, 0, outs[0])
        stored = [cache.clone() for cache in (case.layer.key, case.layer.value)]
        q, k, v = parts(shape, qkv)
        TRITON.rope_write_kv(q, k, v, *rotary, case.layer, case.meta.slot_mapping)
        TRITON.attention(q, k, v, case.layer, case.meta, 0.1, 0, outs[1])
        assert torch.equal(*outs)
        assert all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(stored, (case.layer.key, case.layer.value), strict=True))


@pytest.mark.parametrize(("rows", "fmt", "whole"), [*((rows, fmt, False) for rows in (1, 5, 40) for fmt in ("16", "8", "4 rotated")), (1, "16", True)])
def test_in_a_chain_attention_reads_nothing_too_early(rows: int, fmt: str, whole: bool) -> None:
    """Few rows' programs ask for keys before the product before has ended. Replays with other numbers give what each kernel gives that runs alone."""
    shape, layers = Shape(8, 2, 128, 64, torch.bfloat16, "cuda"), range(6)
    cases = [paged_case(FORMATS[fmt], shape, sequences([(250 + 70 * (i % 9), 1) for i in range(rows)], 50 * layer)) for layer in layers]
    for case in cases:
        case.meta.whole_weights = whole
    up, down = (numbers(shape, seed, outer, 1024) / 32 for seed, outer in ((5, 1536), (6, 1024)))
    angles, start = 300 * torch.rand(rows, 64, device="cuda"), numbers(shape, 7, rows, 1024)
    cos, sin = angles.cos(), angles.sin()  # not between the kernels, which then would not overlap
    hidden = [start] + [torch.empty_like(start) for _ in layers]
    qkv, outs = ([numbers(shape, 8, rows, width) for _ in layers] for width in (1536, 1024))

    def run(between: Callable[[], None]) -> None:
        for i, case in enumerate(cases):
            TRITON.linear(hidden[i], up, None, qkv[i])
            between()
            heads = parts(shape, qkv[i].view(rows, 12, 128))
            TRITON.rope_attention(*heads, cos, sin, None, case.layer, case.meta, 128**-0.5, 0, outs[i])
            between()
            TRITON.linear(outs[i], down, None, hidden[i + 1])
            between()

    run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(lambda: None)
    for seed in range(4):
        start.copy_(numbers(shape, 20 + seed, rows, 1024))
        run(torch.cuda.synchronize)
        wanted = [out.clone() for out in outs]
        for out in (*outs, *qkv):
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(found, alone) for found, alone in zip(outs, wanted, strict=True))


# ---- rope_write_kv


def qkv_case(fmt: KVFormat, shape: Shape, tokens: int, rope: int) -> tuple[Tensor, KVLayer, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """qkv [T, H + 2 K, D], an empty cache, and (cos, sin, q_scale, slots)."""
    qkv = 3 * numbers(shape, 1, tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim) + 1
    blocks = tokens // shape.block_size + 3
    memory = torch.zeros(fmt.layer_bytes(blocks, shape.kv_heads, shape.block_size, shape.head_dim, shape.dtype), dtype=torch.uint8, device=shape.device)
    layer = fmt.layer(memory, blocks, shape.kv_heads, shape.block_size, shape.head_dim, shape.dtype)
    slots = torch.randperm(blocks * shape.block_size, generator=torch.Generator().manual_seed(3))[:tokens].to(shape.device)
    angles = 300 * torch.rand(tokens, rope // 2, device=shape.device)
    return qkv, layer, (angles.cos(), angles.sin(), 1 + torch.rand(tokens, device=shape.device), slots)


def parts(shape: Shape, qkv: Tensor) -> tuple[Tensor, ...]:
    return torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)


@EACH_DTYPE
@EACH_FORMAT
def test_rows_are_rotated_and_stored_exactly(dtype: torch.dtype, fmt: str) -> None:
    for tokens in (1, 777):
        rows_agree(dtype, fmt, 128, 128, tokens)


@pytest.mark.parametrize("fmt", ["16", "k8v4", "fp8"])
@pytest.mark.parametrize(("head_dim", "rope", "tokens"), [(80, 32, 33), (64, 64, 5), (96, 96, 100), (256, 64, 50), (16, 16, 3)])
def test_rows_of_any_head_dim_and_rope(fmt: str, head_dim: int, rope: int, tokens: int) -> None:
    rows_agree(torch.bfloat16, fmt, head_dim, rope, tokens)


@EACH_DTYPE
@pytest.mark.parametrize(
    ("fmt", "head_dim", "rope"), [("16", 128, 128), ("8", 64, 0), ("4 rotated", 128, 128), ("k8v4", 80, 32), ("fp8", 96, 96), ("4 rotated", 256, 64)]
)
def test_centres_leave_rotary_keys(dtype: torch.dtype, fmt: str, head_dim: int, rope: int) -> None:
    for tokens in (1, 333):
        rows_agree(dtype, fmt, head_dim, rope, tokens, center=40.0)


def rows_agree(dtype: torch.dtype, fmt: str, head_dim: int, rope: int, tokens: int, center: float = 0.0) -> None:
    """q, k and v in place as the reference leaves them, and the cache exactly what `quantise_rows` makes of k and v."""
    shape = Shape(8, 2, head_dim, 64, dtype, "cuda")
    qkv, layer, (cos, sin, factor, slots) = qkv_case(FORMATS[fmt], shape, tokens, rope)
    wanted, other = qkv.clone(), qkv_case(FORMATS[fmt], shape, tokens, rope)[1]
    if center:
        layer, other = (replace(x, key_center=center * numbers(replace(shape, dtype=torch.float32), 9, shape.kv_heads, head_dim)) for x in (layer, other))
    TRITON.rope_write_kv(*parts(shape, qkv), cos, sin, factor, layer, slots)
    REFERENCE.rope_write_kv(*parts(shape, wanted), cos, sin, factor, other, slots)
    if FORMATS[fmt].rotated:
        assert error(qkv, wanted) <= (2e-6 if dtype is torch.float32 else 2**-7 if dtype is torch.bfloat16 else 2**-10)  # rope, then rotation: two roundings
    else:
        assert torch.equal(qkv, wanted), "the rope rounds where the reference does"
    stored = ((layer.key, layer.key_scales, layer.key_width), (layer.value, layer.value_scales, layer.value_width))
    for x, (cache, scales, width) in zip(parts(shape, qkv)[1:], stored, strict=True):
        rows = (cache.view(torch.uint8) if width == "fp8" else cache).transpose(1, 2).flatten(0, 1)
        if scales is None:
            assert torch.equal(rows[slots], x)
            continue
        made, pairs = quantise_rows(x, width)
        assert torch.equal(rows[slots], made.view(torch.uint8)) and torch.equal(scales.transpose(1, 2).flatten(0, 1)[slots], pairs)


@pytest.mark.parametrize("fmt", ["8", "4", "fp8"])
def test_extreme_rows_are_stored_as_quantise_rows_says(fmt: str) -> None:
    shape = Shape(4, 2, 64, 64, torch.float32, "cuda")
    qkv, layer, (_, _, _, slots) = qkv_case(FORMATS[fmt], shape, 16, 64)
    qkv *= 10.0 ** torch.arange(-16, 16, 2, device="cuda").view(-1, 1, 1)
    for token, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        qkv[token, 4:, 5] = value
    for token, value in enumerate((0.0, -2.5, 1e30), 3):
        qkv[token, 5] = qkv[token, 7] = value
    TRITON.rope_write_kv(*parts(shape, qkv), qkv.new_empty(16, 0), qkv.new_empty(16, 0), None, layer, slots)
    for x, (cache, scales, width) in zip(
        parts(shape, qkv)[1:], ((layer.key, layer.key_scales, layer.key_width), (layer.value, layer.value_scales, layer.value_width)), strict=True
    ):
        made, pairs = quantise_rows(x, width)
        assert scales is not None
        rows, found = cache.view(torch.uint8).transpose(1, 2).flatten(0, 1)[slots], scales.transpose(1, 2).flatten(0, 1)[slots]
        torch.testing.assert_close(found, pairs, rtol=0, atol=0, equal_nan=True)
        sound = ~pairs.isnan().any(-1)
        assert torch.equal(rows[sound], made.view(torch.uint8)[sound])


def test_what_was_written_is_what_attention_reads() -> None:
    shape, tokens = Shape(8, 2, 128, 64, torch.bfloat16, "cuda"), 192
    qkv, layer, (cos, sin, _, _) = qkv_case(FORMATS["4 rotated"], shape, tokens, 128)
    qkv *= 0.2  # scores of random numbers that are not a matter of one key
    plain = qkv.clone()
    TRITON.rope_write_kv(*parts(shape, qkv), cos, sin, None, layer, torch.arange(tokens, device="cuda"))
    case = paged_case(FORMATS["4 rotated"], shape, [Sequence(tokens, tokens, 0)])
    q, k, v = parts(shape, qkv)
    case = Case(q, layer, replace(case.meta, block_table=torch.arange(3, dtype=torch.int32, device="cuda").view(1, 3)), k, v)
    other = paged_case(FORMATS["16"], shape, [Sequence(tokens, tokens, 0)])
    REFERENCE.rope_write_kv(*parts(shape, plain), cos, sin, None, other.layer, torch.arange(tokens, device="cuda"))
    q, k, v = parts(shape, plain)
    other = Case(q, other.layer, case.meta, k, v)
    assert layer.key_scales is not None and dequantise_rows(layer.key[0, 0, :1], layer.key_scales[0, 0, :1], "4").isfinite().all()
    assert error(case.attend(TRITON), other.attend(REFERENCE)) < 0.2, "what 4 bits lose of random numbers, and no more"


# ---- norms, silu_mul


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (300, 4096), (7, 123), (3, 16384)])
def test_norms_and_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    shape, step = Shape(1, 1, 1, dtype=dtype, device="cuda"), {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    x, residual, weight = 3 * numbers(shape, 0, rows, width), numbers(shape, 1, rows, width), numbers(shape, 2, width)
    found, wanted = torch.empty_like(x), torch.empty_like(x)
    for kernels, out in ((TRITON, found), (REFERENCE, wanted)):
        kernels.rms_norm(x, weight, 1e-5, out)
    assert error(found, wanted) <= step
    sums = [residual.clone(), residual.clone()]
    for kernels, out, total in ((TRITON, found, sums[0]), (REFERENCE, wanted, sums[1])):
        kernels.add_rms_norm(x, total, weight, 1e-5, out)
    assert torch.equal(*sums) and error(found, wanted) <= step
    both = torch.cat([x, residual], 1)
    for kernels, out in ((TRITON, found), (REFERENCE, wanted)):
        kernels.silu_mul(both, out)
    assert error(found, wanted) <= step
    heads = [numbers(shape, 4, rows, 6, 128), numbers(shape, 4, rows, 6, 128)]
    for kernels, part in ((TRITON, heads[0]), (REFERENCE, heads[1])):
        kernels.head_norm(part[:, 1:5], numbers(shape, 5, 128), 1e-6)
    assert error(*heads) <= step


# ---- times


def milliseconds(function: Callable[..., None], *arguments: object) -> float:
    """Median of 20 calls, after 3; where the host is slower than the device, its time."""
    times = []
    for i in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function(*arguments)
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def compared(operator: str, *arguments: object) -> str:
    """Both times of an operator."""
    times = [milliseconds(getattr(kernels, operator), *arguments) for kernels in (TRITON, REFERENCE)]
    return f"triton {times[0]:.3f} ms, torch {times[1]:.3f} ms"


STEPS = {
    "decode 1 x 2000": [(2000, 1)], "decode 64 x 2000": [(2000, 1)] * 64, "decode 1 x 32000": [(32000, 1)], "prefill 4096": [(4096, 4096)],
    "chunk 512 at 8192": [(8192, 512)],
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_times_of_attention(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No bar here, tuning is another matter: a line each for the reader."""
    shape = Shape(32, 8, 128, 64, torch.bfloat16, "cuda")
    for fmt in ("16", "8", "4 rotated", "fp8"):
        case = paged_case(FORMATS[fmt], shape, sequences(STEPS[step]))
        out = torch.empty(case.q.shape[0], 4096, dtype=torch.bfloat16, device="cuda")
        line = compared("attention", case.q, case.q, case.q, case.layer, case.meta, 128**-0.5, 0, out)
        megabytes = sum(n for n, _ in STEPS[step]) * FORMATS[fmt].bytes_per_row(128, torch.bfloat16) * 8 / 1e6
        with capsys.disabled():
            print(f"\nattention 32/8 heads of 128, {step}, {fmt} ({megabytes:.1f} MB of keys and values): {line}", end="")
        assert out.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_times_of_the_small_operators(tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """No bar here either."""
    shape, lines = Shape(32, 8, 128, 64, torch.bfloat16, "cuda"), []
    for fmt in ("16", "8", "4 rotated"):
        qkv, layer, (cos, sin, _, slots) = qkv_case(FORMATS[fmt], shape, tokens, 128)
        lines.append(f"rope_write_kv, {fmt}: {compared('rope_write_kv', *parts(shape, qkv), cos, sin, None, layer, slots)}")
    x, weight, out = numbers(shape, 0, tokens, 4096), numbers(shape, 1, 4096), torch.zeros(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    lines.append(f"add_rms_norm of 4096: {compared('add_rms_norm', x, torch.zeros_like(x), weight, 1e-5, out)}")
    lines.append(f"silu_mul of 2 x 14336: {compared('silu_mul', numbers(shape, 2, tokens, 28672), x.new_empty(tokens, 14336))}")
    with capsys.disabled():
        print("".join(f"\n{tokens} tokens, {line}" for line in lines), end="")
    assert out.isfinite().all()
