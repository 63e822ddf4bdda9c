"""The decoder: loading, row selection, tied heads, biases, and what it says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.checkpoint.random_source import RandomSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.choose import choose_formats
from lmdeploy.kernels.api import NormedProducts
from lmdeploy.kernels.reference import REFERENCE, gated
from lmdeploy.models.decoder import Decoder
from lmdeploy.models.registry import build_model
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec
from tests.formats.packing import quantised_folder
from tests.helpers import LLAMA_CONFIG, Harness, llama_tensors, load_model, write_folder, write_internlm2, write_llama
from tests.kernels import normed_plain
from tests.kernels.quarters_plain import in_quarters

TOKENS = [5, 17, 99, 3, 42, 8, 77]


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return Harness(load_model(folder, **options)).step([(0, TOKENS)])[0]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    edit_weights(write_llama(tmp_path), **{"model.layers.1.self_attn.k_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(tmp_path)


def test_a_tensor_that_nobody_wants_is_named(tmp_path: Path) -> None:
    edit_weights(write_llama(tmp_path), **{"model.layers.0.self_attn.lora.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"self_attn\.lora\.weight"):
        load_model(tmp_path)


def test_a_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    edit_weights(write_internlm2(tmp_path), **{"model.layers.0.attention.wqkv.weight": torch.ones(8 * 24 - 24, 64)})
    with pytest.raises(CheckpointError, match=r"attention\.wqkv\.weight"):
        load_model(tmp_path)


def test_a_tied_head_is_the_embedding_and_counts_once(tmp_path: Path) -> None:
    tied, untied = load_model(write_llama(tmp_path / "a", tie_word_embeddings=True)), load_model(write_llama(tmp_path / "b"))
    assert untied.weight_bytes - tied.weight_bytes == 131 * 64 * 4
    assert untied.weight_bytes == (tmp_path / "b" / "model.safetensors").stat().st_size - _header(tmp_path / "b")


def _header(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def test_a_head_in_the_file_of_a_tied_model_is_not_an_error(tmp_path: Path) -> None:
    write_llama(tmp_path, tie_word_embeddings=True)
    wanted = logits(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, **{"lm_head.weight": table.clone()})
    assert torch.equal(logits(tmp_path), wanted)


def test_another_head_in_the_file_of_a_tied_model_contradicts_it(tmp_path: Path) -> None:
    write_llama(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, **{"lm_head.weight": torch.ones(131, 64)})
    with pytest.raises(CheckpointError, match="tie_word_embeddings=true, but tensor 'lm_head.weight' differs"):
        load_model(tmp_path)


def test_a_bias_in_the_file_is_used_though_the_config_is_silent(tmp_path: Path) -> None:
    write_llama(tmp_path)
    before = logits(tmp_path)
    layer = "model.layers.0.self_attn"
    edit_weights(tmp_path, **{f"{layer}.{name}_proj.bias": torch.full((rows * 24,), 0.5) for name, rows in (("q", 4), ("k", 2), ("v", 2))})
    assert (logits(tmp_path) - before).abs().max() > 0.1


def test_a_bias_of_the_config_that_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        load_model(write_llama(tmp_path, attention_bias=True))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "qkv_bias": True, "bias": False},
        {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True},
    ],
    ids=["internlm3", "internlm"],
)
def test_internlm_1_and_3_are_llama_with_biases(config: dict[str, object], tmp_path: Path) -> None:
    tensors, generator = llama_tensors(LLAMA_CONFIG), torch.Generator().manual_seed(1)
    for layer in range(2):
        for name, rows in (("q", 4 * 24), ("k", 2 * 24), ("v", 2 * 24), ("o", 64)):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.randn(rows, generator=generator)
    write_folder(tmp_path / "llama", {**LLAMA_CONFIG, "attention_bias": True}, tensors)
    write_folder(tmp_path / "internlm", {**LLAMA_CONFIG, **config}, tensors)
    assert torch.equal(logits(tmp_path / "internlm"), logits(tmp_path / "llama"))


@pytest.mark.parametrize("rows", [[6], [0, 3, 4], [5, 1], [2, 2], list(range(7)), []])
def test_only_the_wanted_rows_are_finished_and_they_are_the_same(tmp_path: Path, rows: list[int]) -> None:
    model = load_model(write_llama(tmp_path))
    wanted = Harness(model).step([(0, TOKENS)])[0]
    harness = Harness(model)
    found = run_rows(harness, rows)
    assert found.shape == (len(rows), 131)
    torch.testing.assert_close(found, wanted[rows], rtol=0, atol=1e-5)
    after = harness.step([(0, [9])])[0]  # KV of all rows was written all the same
    torch.testing.assert_close(after[0], Harness(model).step([(0, [*TOKENS, 9])])[0][-1], rtol=0, atol=1e-5)


@torch.inference_mode()
def run_rows(harness: Harness, rows: list[int]) -> torch.Tensor:
    """Logits of some rows of TOKENS as sequence 0."""
    harness.step([(0, TOKENS)])
    harness.drop(0)
    inputs = harness.begin([(0, TOKENS)])
    inputs.logit_rows = torch.tensor(rows, dtype=torch.int64)
    return harness.model.logits(harness.model.forward(inputs))


def test_a_second_step_of_the_same_size_reserves_no_memory(tmp_path: Path) -> None:
    harness = Harness(load_model(write_llama(tmp_path)))
    harness.step([(0, TOKENS)])
    reserved = harness.scratch.nbytes
    harness.step([(1, TOKENS * 3), (0, [4])])
    assert harness.scratch.nbytes == reserved > 0


def test_two_models_in_one_process_do_not_meet(tmp_path: Path) -> None:
    folders = [write_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    alone = []
    for folder in folders:
        harness = Harness(load_model(folder))
        alone.append([harness.step([(0, TOKENS)])[0], harness.step([(0, [7])])[0]])
    together = [Harness(load_model(folder)) for folder in folders]
    for turn, tokens in enumerate((TOKENS, [7])):
        out = [harness.step([(0, tokens)])[0] for harness in together]
        assert torch.equal(out[0], alone[0][turn]) and torch.equal(out[1], alone[1][turn])


def test_layers_call_the_kernels_they_are_given(tmp_path: Path) -> None:
    calls: list[tuple[int, ...]] = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        calls.append((*weight.shape, x.shape[0]))
        REFERENCE.linear(x, weight, bias, out)

    harness = Harness(load_model(write_llama(tmp_path), kernels=replace(REFERENCE, linear=linear, linear_silu=gated(linear, REFERENCE.silu_mul))))
    harness.step([(0, TOKENS)])
    layer = [(8 * 24, 64, 7), (64, 4 * 24, 7), (2 * 88, 64, 7), (64, 88, 7)]
    assert calls == layer * 2 + [(131, 64, 7)]


@pytest.mark.parametrize("fewest", [1, 2])
def test_a_product_that_adds_to_the_residual_itself_is_used_where_it_serves(fewest: int, tmp_path: Path) -> None:
    calls: list[tuple[int, ...]] = []

    def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> bool:
        if x.shape[0] >= fewest:
            calls.append((*weight.shape, x.shape[0]))
            residual.addmm_(x, weight.t())
        return x.shape[0] >= fewest

    folder = write_llama(tmp_path)
    found = run_rows(Harness(load_model(folder, kernels=replace(REFERENCE, linear_add=linear_add))), [6])
    torch.testing.assert_close(found, logits(folder, kernels=REFERENCE)[6:], rtol=1e-5, atol=1e-5)
    layer, one_row = [(64, 4 * 24, 7), (64, 88, 7)], [(64, 4 * 24, 1), (64, 88, 1)]
    assert calls == layer * 3 + one_row * (fewest == 1)


@pytest.mark.parametrize("rows", [[6], [0, 3, 4], list(range(7)), []])
def test_norms_inside_products_change_nothing(tmp_path: Path, rows: list[int]) -> None:
    """Also beside a bias, and where fewer rows are finished than begun."""
    tensors, generator = llama_tensors(LLAMA_CONFIG), torch.Generator().manual_seed(1)
    for layer in range(2):
        for name, size in (("q", 4 * 24), ("k", 2 * 24), ("v", 2 * 24), ("o", 64)):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.randn(size, generator=generator)
    write_folder(tmp_path, {**LLAMA_CONFIG, "attention_bias": True}, tensors)
    calls: list[int] = []

    def product(x: torch.Tensor, *rest: Any) -> None:
        calls.append(x.shape[0])
        normed_plain.product(x, *rest)

    apart, inside = load_model(tmp_path), load_model(tmp_path, kernels=replace(REFERENCE, normed=NormedProducts(lambda weight, outer, dtype: 7, product)))
    assert apart.normed_rows == 0 and inside.normed_rows == 7
    wanted, found = run_rows(Harness(apart), rows), run_rows(harness := Harness(inside), rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    last = [len(rows)] * (2 if rows else 0)
    assert (
        calls == [7] * 10 + last
    )  # of the first layer output, gate_up and down, of the second qkv, and of the rows that are wanted (all, then these) output and gate_up
    harness.step([(1, [*TOKENS, 9])])  # a row more than they take
    assert calls[10:] == last


@pytest.mark.parametrize("normed", [False, True])
def test_an_operator_that_begins_a_step_is_used_and_clears_what_products_add_up(tmp_path: Path, normed: bool) -> None:
    given: list[torch.Tensor | None] = []

    def embed_norm(ids: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, eps: float, *rest: Any) -> None:
        residual, out, zeros = rest
        given.append(zeros)
        torch.index_select(table, 0, ids, out=residual)
        REFERENCE.rms_norm(residual, weight, eps, out)
        if zeros is not None:
            zeros.zero_()

    folder = write_llama(tmp_path)
    inside = NormedProducts(lambda weight, outer, dtype: 7, normed_plain.product) if normed else None
    harness = Harness(load_model(folder, kernels=replace(REFERENCE, normed=inside, embed_norm=embed_norm)))
    torch.testing.assert_close(run_rows(harness, [6]), logits(folder, kernels=REFERENCE)[6:], rtol=1e-4, atol=1e-4)
    assert len(given) == 2 and all((zeros is not None and zeros.shape == (4, 7)) == normed for zeros in given)


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # groups of 128


@pytest.mark.parametrize("rows", [[6], [0, 3, 4], list(range(7)), [], None])
def test_rows_in_quarters_change_nothing(tmp_path: Path, rows: list[int] | None) -> None:
    """Written and read in that order everywhere but after attention and in the last layer's second half; None: every row's logits, as a step of answers."""
    folder, _ = quantised_folder(write_llama(tmp_path / "dense", **WIDE), tmp_path, "awq", 128)
    calls: list[tuple[str, int]] = []
    apart, inside = load_model(folder), load_model(folder, kernels=in_quarters(REFERENCE, range(7, 9), calls))
    assert apart.quartered_rows == range(0) and inside.quartered_rows == range(7, 9)
    results = []
    for harness in (Harness(apart), Harness(inside)):
        inputs = harness.begin([(0, TOKENS)])
        if rows is None:
            inputs.every_row = True
        else:
            inputs.logit_rows = torch.tensor(rows, dtype=torch.int64)
        results.append(harness.model.logits(harness.model.forward(inputs)))
    assert torch.equal(*results) and len(results[0]) == (7 if rows is None else len(rows))
    assert calls == [(name, 7) for name in ("norm", "product", "add", "product", "silu", "product", "add", "product")]
    harness.step([(1, TOKENS[:6])])  # a row less than they take
    assert len(calls) == 8


@pytest.mark.parametrize(
    ("method", "options"), [("awq", {"skip": ("layers.1.mlp.down_proj",)}), ("gptq", {"act_order": True}), ("awq", {"group_size": 64})], ids=str
)
def test_rows_are_in_quarters_only_where_all_products_read_them_so(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = quantised_folder(write_llama(tmp_path / "dense", **WIDE), tmp_path, method, **{"group_size": 128, **options})
    calls: list[tuple[str, int]] = []
    model = load_model(folder, kernels=in_quarters(REFERENCE, range(1, 99), calls))
    assert 7 not in model.quartered_rows
    assert torch.equal(Harness(model).step([(0, TOKENS)])[0], logits(folder)) and not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    write_llama(tmp_path)
    exact, rounded = logits(tmp_path), logits(tmp_path, dtype=dtype)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).pow(2).mean().sqrt() < 0.03 * exact.std()


def test_logn_scales_queries_past_the_training_length(tmp_path: Path) -> None:
    write_llama(tmp_path, max_position_embeddings=8)
    plain, scaled = (Harness(load_model(tmp_path, overrides={"use_logn_attn": on})).step([(0, TOKENS * 3)])[0] for on in (False, True))
    assert torch.equal(plain[:8], scaled[:8])
    assert ((plain[8:] - scaled[8:]).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("write", [write_llama, write_internlm2])
def test_smoothing_groups_name_modules_of_the_file(tmp_path: Path, write: Any) -> None:
    model: Decoder = load_model(write(tmp_path, num_key_value_heads=4))
    on_disk = set(load_file(tmp_path / "model.safetensors"))
    groups = model.smoothing_groups()
    for group in groups:
        for name in (group.source, *group.targets):
            assert f"model.layers.1.{name}.weight" in on_disk
    assert sum(group.source_is_norm for group in groups) == 2
    covered = {target for group in groups if group.source_is_norm for target in group.targets}
    llama = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
    assert covered == (llama if write is write_llama else {"attention.wqkv", "feed_forward.w1", "feed_forward.w3"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5, "architectures": ["MistralForCausalLM"]}])
def test_cuda_gives_the_logits_of_the_cpu(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_llama(tmp_path, **changes)
    on_cpu, on_cuda = Harness(load_model(tmp_path)), Harness(load_model(tmp_path, device="cuda"))
    for new in ([(0, TOKENS * 3), (1, TOKENS)], [(0, [4]), (1, TOKENS), (2, [9])]):
        wanted, found = on_cpu.step(new), on_cuda.step(new)
        for name, rows in wanted.items():
            torch.testing.assert_close(found[name].cpu(), rows, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_format", ["auto", "fp8"])
def test_only_quantised_experts_make_the_host_wait_for_the_device(model_format: str) -> None:
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "hidden_size": 64}
    for architecture in ("Qwen3MoeForCausalLM", "LlamaForCausalLM"):
        config = {**LLAMA_CONFIG, "architectures": [architecture], **(changes if "Moe" in architecture else {})}
        config["model_type"] = "qwen3_moe" if "Moe" in architecture else "llama"
        formats = choose_formats(None, None if model_format == "auto" else model_format)
        model = build_model(ModelSpec.from_config(config), torch.float32, torch.device("cpu"), REFERENCE, Parallel(), formats)
        model.load(RandomSource())
        assert model.waits_for_device() == (model_format == "fp8" and "Moe" in architecture)


def test_a_shallow_model_has_one_layer_of_each_kind_and_the_last() -> None:
    config = {**LLAMA_CONFIG, "num_hidden_layers": 6, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [0, 2, 3]}
    config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = build_model(ModelSpec.from_config(config), torch.float32, torch.device("cpu"), REFERENCE, Parallel(), choose_formats(None, None))
    model.load(RandomSource())
    layers = list(model.layers)
    shallow, share = model.shallow()
    assert [layers.index(layer) for layer in shallow.layers] == [0, 1, 5] and share == 0.5
    assert model.layers == layers, "the model itself keeps all"
