"""`DenseWeight`: parts of several modules, fused tensors and rank slices end where a plain torch computation says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.dense import DenseWeight
from lmdeploy.formats.weight_format import Part, TensorSpec, WeightFormat
from lmdeploy.kernels.api import Kernels

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(3)
Q, K = torch.randn(8, 6, generator=GENERATOR), torch.randn(4, 6, generator=GENERATOR)
Q_BIAS, K_BIAS = torch.randn(8, generator=GENERATOR), torch.randn(4, generator=GENERATOR)


@pytest.fixture
def source(tmp_path: Path) -> WeightSource:
    save_file({"q.weight": Q, "k.weight": K, "q.bias": Q_BIAS, "k.bias": K_BIAS}, tmp_path / "model.safetensors")
    return open_source(tmp_path)


def test_parts_fill_the_rows_in_their_order(source: WeightSource) -> None:
    layer = DenseWeight.allocate(12, 6, True, torch.float32, CPU)
    layer.load(source, [Part("q", 8, 6), Part("k", 4, 6)])
    assert torch.equal(layer.weight, torch.cat([Q, K]))
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.cat([Q_BIAS, K_BIAS]))
    source.finish()


def test_a_rank_reads_only_its_rows_of_a_column_layer(source: WeightSource) -> None:
    layer = DenseWeight.allocate(6, 6, True, torch.float32, CPU)
    layer.load(source, [Part("q", 8, 6, [slice(4, 8)]), Part("k", 4, 6, [slice(2, 4)])])
    assert torch.equal(layer.weight, torch.cat([Q[4:], K[2:]]))
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.cat([Q_BIAS[4:], K_BIAS[2:]]))


def test_a_rank_reads_only_its_columns_of_a_row_layer_and_the_whole_bias(source: WeightSource) -> None:
    layer = DenseWeight.allocate(8, 3, True, torch.float32, CPU)
    layer.load(source, [Part("q", 8, 6, cols=slice(3, 6))])
    assert torch.equal(layer.weight, Q[:, 3:])
    assert layer.bias is not None
    assert torch.equal(layer.bias, Q_BIAS)


def test_a_fused_tensor_is_taken_apart_by_row_ranges(source: WeightSource) -> None:
    layer = DenseWeight.allocate(8, 6, True, torch.bfloat16, CPU)
    layer.load(source, [Part("q", 8, 6, [slice(0, 2), slice(4, 6)]), Part("q", 8, 6, [slice(2, 4), slice(6, 8)])])
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(layer.weight, Q[order].bfloat16())
    assert layer.bias is not None
    assert torch.equal(layer.bias, Q_BIAS[order].bfloat16())


def test_sizes_that_contradict_config_json_are_refused(source: WeightSource) -> None:
    layer = DenseWeight.allocate(4, 6, False, torch.float32, CPU)
    with pytest.raises(CheckpointError, match=r"'q\.weight' has shape \[8, 6\], but config\.json asks for \[4, 6\]"):
        layer.load(source, [Part("q", 4, 6)])


def test_parts_that_do_not_add_up_are_our_own_mistake(source: WeightSource) -> None:
    with pytest.raises(AssertionError, match="do not fill 5 rows"):
        DenseWeight.allocate(5, 6, False, torch.float32, CPU).load(source, [Part("k", 4, 6)])


@pytest.fixture
def linear_kernels() -> Kernels:
    """A kernel set of which only `linear` may be called."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(torch.nn.functional.linear(x, weight, bias))

    def forbidden(*args: object) -> None:
        raise AssertionError("a dense layer needs linear only")

    others: dict[str, Callable[..., None]] = {n: forbidden for n in Kernels.__dataclass_fields__ if n not in ("linear", "names")}
    return Kernels(linear=linear, names={}, **others)


@pytest.mark.parametrize("bias", [True, False])
def test_matmul_multiplies_and_adds_the_bias(source: WeightSource, linear_kernels: Kernels, bias: bool) -> None:
    layer: WeightFormat = DenseWeight.allocate(8, 6, bias, torch.float32, CPU)
    layer.load(source, [Part("q", 8, 6)])
    x, out = torch.randn(5, 6, generator=GENERATOR), torch.empty(5, 8)
    layer.matmul(x, out, linear_kernels)
    torch.testing.assert_close(out, x @ Q.T + (Q_BIAS if bias else 0))
    assert layer.nbytes == 4 * (8 * 6 + (8 if bias else 0))


def test_a_tensor_spec_knows_its_shape_by_its_axes() -> None:
    assert TensorSpec("weight", 0, 1).shape(8, 6) == (8, 6)
    assert TensorSpec("qweight", 1, 0).shape(8, 6) == (6, 8)
    assert TensorSpec("bias", 0, None).shape(8, 6) == (8,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_land_on_the_gpu_cast_and_cut(source: WeightSource, dtype: torch.dtype) -> None:
    layer = DenseWeight.allocate(8, 3, True, dtype, torch.device("cuda"))
    layer.load(source, [Part("q", 8, 6, [slice(0, 2), slice(4, 6)], slice(1, 4)), Part("k", 4, 6, cols=slice(1, 4))])
    assert layer.weight.is_cuda
    assert torch.equal(layer.weight.cpu(), torch.cat([Q[[0, 1, 4, 5], 1:4], K[:, 1:4]]).to(dtype))
    assert layer.bias is not None
    assert torch.equal(layer.bias.cpu(), torch.cat([Q_BIAS[[0, 1, 4, 5]], K_BIAS]).to(dtype))
