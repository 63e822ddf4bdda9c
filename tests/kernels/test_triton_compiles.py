"""Kernels compiled for Hopper and Ampere without a GPU: what the interpreter lets pass (types of branches, shared memory) fails here and not on the device."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

compiler = pytest.importorskip("triton.compiler", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from lmdeploy.kernels.triton_kernels import (  # noqa: E402
    activation,
    angles,
    decode,
    decode_direct,
    decode_plain,
    decode_row16,
    decode_shared,
    embedding,
    experts,
    linear16,
    linear_w4,
    linear_w4_mid,
    linear_w4_row,
    norms,
    places,
    routing,
)

BF16, I64, I32 = "*bf16", "*i64", "*i32"
NORMS = {"before": I64, "eps": "fp32", "residual": BF16, "gain": BF16, "squares": I64}
ROW = {"x": BF16, "weight": BF16, "bias": BF16, "out": BF16, "N": "i32", "K": "i32", **NORMS}
ROWS = {**ROW, "parts": "*fp32", "arrivals": I32, "T": "i32", "x_row": "i32", "out_row": "i32"}
NORM = {
    "x_ptr": BF16,
    "residual_ptr": BF16,
    "weight_ptr": BF16,
    "out_ptr": BF16,
    "eps": "fp32",
    "x_stride": "i32",
    "residual_stride": "i32",
    "out_stride": "i32",
}
EMBEDDED = {
    **dict.fromkeys(("ids_ptr", "zeros_ptr"), I64),
    **dict.fromkeys(("table_ptr", "weight_ptr", "residual_ptr", "out_ptr"), BF16),
    **dict.fromkeys(("count", "residual_stride", "out_stride"), "i32"),
    "eps": "fp32",
}
SILU = {"both_ptr": BF16, "out_ptr": BF16, "both_stride": "i32", "out_stride": "i32", "width": "i32"}
PLACES = {
    **dict.fromkeys(
        ("positions_ptr", "token_slots_ptr", "slots_ptr", "ends_ptr", "starts_ptr", "rope_lengths_ptr", "ids_ptr", "mapping_ptr", "ropes_ptr"), I64
    ),
    **dict.fromkeys(("tokens_ptr", "blocks_ptr", "lens_ptr", "query_start_ptr", "table_ptr"), I32),
    **dict.fromkeys(("num_tokens", "num_sequences", "context", "max_blocks", "width"), "i32"),
}
ANGLES = {
    **dict.fromkeys(("positions_ptr", "lengths_ptr"), I64),
    **dict.fromkeys(("frequencies_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
    **dict.fromkeys(("num_tokens", "limit"), "i32"),
}
DYNAMIC = {
    "BY_LENGTH": True,
    "THETA": 1e6,
    "FACTOR": 2.0,
    "SHARE": 1 / 32768,
    "POWER": 128 / 126,
    "SCALE": 1.0,
    "HALF": 64,
    "PADDED": 64,
    "ROWS": 4,
}
SORT = {"chosen": I64, "order": I32, "tiles": I32, "pairs": "i32", "most": "i32"}
GROUPED = {"x": BF16, "weight": BF16, "out": BF16, "order": I32, "tiles": I32, **dict.fromkeys(("N", "K", "x_row", "most", "choices"), "i32")}
GATE_UP_1 = {"x": BF16, "weight": BF16, "chosen": I64, "hidden": BF16, "N": "i32", "K": "i32"}
DOWN_1 = {"hidden": BF16, "weight": BF16, "chosen": I64, "shares": "*fp32", "out": BF16, "N": "i32", "K": "i32", "choices": "i32"}
SUM = {"parts": BF16, "weights": "*fp32", "out": BF16, "width": "i32", "choices": "i32"}
ROUTE = {"scores": BF16, "chosen": I64, "weights": "*fp32", "score_row": "i32"}
W4 = {
    "x": BF16,
    "sums": "*fp32",
    "qweight": "*i16",
    "scales": "*fp16",
    "zeros": "*u8",
    "bias": BF16,
    "out": BF16,
    "parts": "*fp32",
    "arrived": I32,
    **dict.fromkeys(("T", "N", "pitch", "padded", "out_row", "groups", "splits", "steps"), "i32"),
}
FEW = {**W4, **ROW, "words": I32, "qweight": "*u8", "word_row": "i32", "x_row": "i32"}
ONE = {**FEW, "x": I64, "qweight": I32, "words": "i32", "tiles": "i32"}
INSIDE = {"HALF": 64, "PER": 1, "ASM": True, "BEFORE": False, "AFTER": False, "SILU": False}
MID = {"QUARTER": 32, "PER": 1, "HAS_BIAS": True, "SPLIT": True, "ASM": True, "BM": 64, "BN": 128, "BAND": 8, "AHEAD": 2, "DEEP": 8, "STAGES": 3}
PARTED = {"x": "*i64", "out": BF16, "sums": "*fp32", "tiles": "i32", "x_row": "i32", "padded": "i32"}
CASES = {
    "one row": (linear16._row_kernel, ROW, {"SILU": False, "HAS_BIAS": True, "WHOLE": True, "BN": 4, "BK": 2048}, 3),
    "one row with silu": (linear16._row_kernel, ROW, {"SILU": True, "HAS_BIAS": False, "WHOLE": True, "BN": 2, "BK": 4096}, 3),
    "one long row": (linear16._row_kernel, ROW, {"SILU": True, "HAS_BIAS": True, "WHOLE": False, "BN": 4, "BK": 1024}, 3),
    "16 rows in parts": (linear16._rows_kernel, ROWS, {"SILU": False, "HAS_BIAS": True, "SPLIT": 4, "BM": 16, "BN": 64, "BK": 128}, 4),
    "64 rows with silu": (linear16._rows_kernel, ROWS, {"SILU": True, "HAS_BIAS": True, "SPLIT": 1, "BM": 64, "BN": 64, "BK": 128}, 4),
    "one row between norms": (
        linear16._row_kernel,
        ROW,
        {"BEFORE": True, "AFTER": True, "SILU": False, "HAS_BIAS": False, "WHOLE": True, "BN": 4, "BK": 2048},
        3,
    ),
    "rows after a norm": (linear16._rows_kernel, ROWS, {"BEFORE": True, "SILU": True, "HAS_BIAS": False, "SPLIT": 1, "BM": 64, "BN": 64, "BK": 128}, 4),
    "rows before a norm": (linear16._rows_kernel, ROWS, {"AFTER": True, "SILU": False, "HAS_BIAS": False, "SPLIT": 4, "BM": 16, "BN": 64, "BK": 128}, 4),
    "norm": (norms._rms_norm_kernel, NORM, {"WIDTH": 4096, "ADD": True, "QUARTERS": False, "BLOCK": 4096}, 3),
    "norm in quarters": (norms._rms_norm_kernel, NORM, {"WIDTH": 3072, "ADD": True, "QUARTERS": True, "BLOCK": 4096}, 3),
    "embedding and norm": (embedding._embed_norm_kernel, EMBEDDED, {"WIDTH": 4096, "BLOCK": 4096}, 3),
    "silu": (activation._silu_mul_kernel, SILU, {"QUARTERS": False, "BLOCK": 1024}, 3),
    "silu in quarters": (activation._silu_mul_kernel, SILU, {"QUARTERS": True, "BLOCK": 1024}, 3),
    "small 4-bit weight before a norm": (linear_w4._once_kernel, FEW, {**INSIDE, "AFTER": True, "SPLIT": True, "TILES": 16, "BM": 8, "BN": 32}, 1),
    "4-bit weight after a norm": (linear_w4._few_kernel, FEW, {**INSIDE, "BEFORE": True, "SILU": True, "W": 4, "BM": 16, "BN": 64, "AHEAD": 4, "STAGES": 2}, 3),
    "4-bit weight and more rows": (
        linear_w4._many_kernel,
        FEW,
        {"HALF": 64, "PER": 1, "ASM": True, "SPLIT": True, "BM": 64, "BN": 64, "BAND": 8, "STAGES": 3},
        3,
    ),
    "long 4-bit rows between norms": (
        linear_w4_row._row_kernel,
        ONE,
        {"BEFORE": True, "AFTER": True, "PER": 1, "ONCE": False, "ASM": True, "R": 16, "G": 16},
        3,
    ),
    "4-bit weights": (linear_w4_mid._mid_kernel, W4, MID, 3),
    "quarters of rows": (linear_w4_mid._part_kernel, PARTED, {"QUARTER": 32, "SUMS": True, "BT": 8}, 3),
    "places": (places._places_kernel, PLACES, {"ROPES": True, "SIZE": 64, "BLOCK": 128}, 3),
    "angles of a dynamic rope": (angles._angles_kernel, ANGLES, DYNAMIC, 3),
    "angles of fixed frequencies": (angles._angles_kernel, ANGLES, {**DYNAMIC, "BY_LENGTH": False, "THETA": 0.0}, 3),
    "sort by expert": (experts._sort_kernel, SORT, {"COUNT": 128, "BINS": 128, "BM": 16, "BLOCK": 1024}, 3),
    "experts of few tokens": (experts._product_kernel, GROUPED, {"SILU": False, "BM": 16, "BN": 64, "BK": 128}, 4),
    "experts of many tokens": (experts._product_kernel, GROUPED, {"SILU": True, "BM": 64, "BN": 128, "BK": 64}, 3),
    "gate and up of one token": (experts._gate_up_of_one_kernel, GATE_UP_1, {"WHOLE": True, "BN": 2, "BK": 4096}, 3),
    "gate and up of a long token": (experts._gate_up_of_one_kernel, GATE_UP_1, {"WHOLE": False, "BN": 4, "BK": 1024}, 3),
    "down of one token": (experts._down_of_one_kernel, DOWN_1, {"PLACES": 8, "BN": 4, "BK": 256}, 3),
    "sum over choices": (experts._sum_kernel, SUM, {"BLOCK": 1024}, 3),
    "choice of experts": (routing._choose_kernel, ROUTE, {"COUNT": 128, "CHOICES": 8, "NORMALISE": True, "BINS": 128, "PLACES": 8}, 3),
}


# Every launch that is chosen somewhere; each number type with split sums and without, with few rows and many, and both where registers are scarcest.
@pytest.mark.parametrize(
    ("rows", "outer", "inner", "fp16"),
    [
        (32, 4096, 14336, False),
        (64, 28672, 4096, True),
        (64, 2048, 2048, False),
        (128, 4096, 4096, True),
        (384, 28672, 4096, False),
        (384, 28672, 4096, True),
    ],
)
def test_the_gluon_kernel_compiles_for_hopper(rows: int, outer: int, inner: int, fp16: bool) -> None:
    module = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_async", reason="a Triton without Gluon")
    source_of = pytest.importorskip("triton.experimental.gluon._runtime").GluonASTSource
    launch = module._launch(rows, outer, inner)
    kernel, number = module._async_kernel, "*fp16" if fp16 else BF16
    constants = {"PER": 2, "HAS_BIAS": fp16, "SPLIT": launch.splits > 1, "FP16": fp16, "BM": launch.rows, "BN": launch.columns, "BAND": 8}
    constants |= {"STAGES": launch.stages, "W": launch.warps}
    types = {**W4, "x": number, "bias": number, "out": number}
    names: list[str] = kernel.arg_names
    attributes: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "i32")[0] == "*" or n == "pitch"}
    source = source_of(
        kernel, {name: types.get(name, "constexpr") for name in names}, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    compiled = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.warps})
    assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.metadata.shared <= 227 << 10
    copies = [line for line in compiled.asm["ptx"].splitlines() if "cp.async.c" in line and "group" not in line]
    assert copies and all("0x10" in line for line in copies), "16 bytes at a time, whatever the number of rows"


# Each width of keys, each of values and both numbers of groups on each chip; a width is read by the same instructions whatever the other one is.
@pytest.mark.parametrize("warps", [1, 8])
@pytest.mark.parametrize(
    ("capability", "key", "value", "groups"),
    [(80, "8", "8", 1), (80, "4", "4", 2), (80, "fp8", "fp8", 1), (90, "4", "4", 1), (90, "8", "4", 2), (90, "8", "8", 1), (90, "fp8", "fp8", 1)],
)
def test_decoding_straight_into_registers_compiles(key: str, value: str, groups: int, capability: int, warps: int) -> None:
    kernel, hopper = decode_direct._direct_decode_kernel if warps == 1 else decode_shared.shared_decode_kernel, capability >= 90
    types = {
        **dict.fromkeys(("q_ptr", "out_ptr", "k_ptr", "v_ptr", "factor_ptr", "center_ptr"), BF16),
        **dict.fromkeys(("sums_ptr", "parts_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("table_ptr", "kv_lens_ptr", "counters_ptr", "key_scales_ptr", "value_scales_ptr"), I32),
        "key_ptr": "*u8",
        "value_ptr": "*u8",
        "scale": "fp32",
    }
    constants = {"GROUP": 4, "HEADS": 8, "SLOTS": 64, "KEY_WIDTH": key, "VALUE_WIDTH": value, "ROTATED": value == "4", "FUSED": True, "ROPE_HALF": 64}
    constants |= {"SCALED": False, "CENTRED": True, "PIECES": 16, "PIECE": 256, "CUT": 128 if warps == 1 else 256, "ROWS": 4, "CHUNK": 4}
    constants |= {"GROUPS": groups, "PDL": hopper}
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "i32")[0] == "*"}
    source = compiler.ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": False})
    layouts = {found for line in compiled.asm["ttgir"].splitlines() if "elementwise_inline_asm" in line for found in re.findall(r"tensor<[^#]*#(\w+)>", line)}
    assert len(layouts) == 1, "a thread has its own number of every tensor"
    name = layouts.pop()
    assert f"#{name} = #ttg.blocked<{{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{warps}], order = [0]}}>" in compiled.asm["ttgir"]
    ptx = compiled.asm["ptx"]
    assert len(re.findall(r"\.shared .* gathered\[", ptx)) == (warps > 1), "the parts of a piece meet in one place"
    if warps > 1 and hopper:
        wait, loads = ptx.index("griddepcontrol.wait"), [found.start() for found in re.finditer(r"ld\.global\.L1::no_allocate", ptx)]
        assert min(loads) < wait, "old keys are asked for before the kernel before has ended"
        assert wait < ptx.index("st.global") and wait < ptx.index("ld.global.b16"), "what this step's kernels write is touched after it"


@pytest.mark.parametrize("capability", [80, 90])
def test_decoding_asks_for_keys_before_it_waits(capability: int) -> None:
    """What the pipeline loads ahead stands before the wait for the kernel before, which is in the loop's first turn; queries and the new key come after."""
    kernel, hopper = decode_plain.plain_decode_kernel, capability >= 90
    types = {
        **dict.fromkeys(("q_ptr", "out_ptr", "key_ptr", "value_ptr", "k_ptr", "v_ptr", "factor_ptr"), BF16),
        **dict.fromkeys(("sums_ptr", "parts_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("table_ptr", "kv_lens_ptr", "counters_ptr"), I32),
        "scale": "fp32",
    }
    constants = {"GROUP": 4, "HEADS": 8, "SLOTS": 64, "KEY_TYPE": tl.bfloat16, "HALF": 64, "PADDED": 64, "FUSED": True, "ROPE_HALF": 64, "SCALED": False}
    constants |= {"PIECES": 16, "PIECE": 512, "CUT": 128, "M": 16, "N": 64, "ROWS": 4, "CHUNK": 8, "EARLY": True, "PDL": hopper}
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "i32")[0] == "*" or name.endswith("stride")
    }
    source = compiler.ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = compiler.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": decode.EARLY_TILES + 1, "enable_fp_fusion": False}
    )
    text = compiled.asm["ptx"]
    assert compiled.metadata.shared <= (227 << 10 if hopper else 163 << 10)
    if hopper:
        before, after = text.split("griddepcontrol.wait", 1)
        assert before.count("cp.async.cg") == decode.EARLY_TILES * 4 * 4, "keys and values in two halves each, four copies a thread"
        assert "st.global" not in before and "griddepcontrol.wait" not in after


@pytest.mark.parametrize(("capability", "dtype", "group"), [(80, "*fp16", 8), (90, BF16, 4)])
def test_decoding_of_a_row_alone_compiles(capability: int, dtype: str, group: int) -> None:
    kernel, hopper = decode_row16.row_decode_kernel, capability >= 90
    types = {
        **dict.fromkeys(("q_ptr", "out_ptr", "key_ptr", "value_ptr", "k_ptr", "v_ptr", "factor_ptr"), dtype),
        **dict.fromkeys(("sums_ptr", "parts_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("table_ptr", "kv_lens_ptr", "counters_ptr"), I32),
        "scale": "fp32",
    }
    constants = {"GROUP": group, "HEADS": 8, "SLOTS": 64, "FUSED": True, "ROPE_HALF": 64, "SCALED": False, "PIECES": 16, "PIECE": 128, "CUT": 128}
    constants |= {"CHUNK": 8, "PDL": hopper}
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "i32")[0] == "*" or name.endswith("stride")
    }
    source = compiler.ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    options = {"num_warps": 8, "maxnreg": decode_row16.REGISTERS, "enable_fp_fusion": False}
    compiled = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = compiled.asm["ptx"]
    assert text.count("st.shared") == 34 + 1 + 1, "warps meet once a piece, and all learn who arrives last; nothing else goes through shared memory"
    if hopper:
        before, after = text.split("griddepcontrol.wait", 1)
        assert before.count("ld.global.L1::no_allocate") == 16 and "st.global" not in before, "keys and values of the first tiles"
        assert after.count("ld.global.v2.b32") == 12 and "ld.global.b16" not in after, "queries and the new key, the new value: four dims at once"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(case: str, capability: int) -> None:
    kernel, types, constants, stages = CASES[case]
    hopper = capability >= 90
    if "PDL" in kernel.arg_names:
        constants = {**constants, "PDL": hopper}
    names: list[str] = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "i32")[0] == "*" or name in ("K", "x_row")}
    source = compiler.ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": stages, "enable_fp_fusion": True})
    assert compiled.asm["ptx"].count("griddepcontrol.wait") == int(hopper and "PDL" in constants)
    if hopper:
        assert compiled.metadata.shared <= 227 << 10
    if kernel is linear_w4_mid._mid_kernel:  # from shared memory to the registers of tensor cores, with no other order of threads between
        loads = [line for line in compiled.asm["ttgir"].splitlines() if "local_load" in line and "xi16" in line]
        assert loads and all("dot_op<{opIdx = 0" in line for line in loads)
