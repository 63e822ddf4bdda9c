"""Every model family, experts included, through every method on its tiny model; what is written runs and computes nearly the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.lite import auto_awq, auto_gptq, smooth_quant
from lmdeploy.spec import load_spec
from tests.helpers import Harness, load_model
from tests.lite.tiny import write_text, write_tokenizer
from tests.lite.unpacking import dense_copy
from tests.parity.families import FAMILIES, make_reference

#: those with one KV head of 20 or a width of 60 have no 4-bit layout: they do not fill words of eight numbers
FITTING = [name for name, family in FAMILIES.items() if family.changes.get("num_key_value_heads") != 1 or family.changes.get("head_dim") == 32]
#: the share of the logits' size by which a random model of 3 layers, whose weights are as large as can be, may be off after rounding to so many bits
LIMIT = {"awq": 0.8, "gptq": 0.8, "w8a8": 0.25}


def quantised(method: str, folder: Path, out: Path, text: str) -> Path:
    """The folder that a command writes, with as little text as it takes."""
    common: dict[str, Any] = {
        "calib_dataset": text, "calib_samples": 4, "calib_seqlen": 48, "batch_size": 4, "eval_tokens": 0, "work_dir": str(out), "dtype": "float32",
    }  # fmt: skip
    report = {
        "awq": lambda: auto_awq(str(folder), w_group_size=8, **common),
        "gptq": lambda: auto_gptq(str(folder), w_group_size=8, **common),
        "w8a8": lambda: smooth_quant(str(folder), **common),
    }[method]()
    assert report.warnings == []
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_writes_every_family(family: str, tmp_path: Path) -> None:
    folder, text = tmp_path / "model", write_text(tmp_path)
    make_reference(FAMILIES[family], folder)
    write_tokenizer(folder)
    prompt = torch.randint(3, load_spec(folder).vocab_size, (14,), generator=torch.Generator().manual_seed(3)).tolist()
    before = Harness(load_model(folder)).step([(0, prompt)])[0]
    for method in ("awq", "gptq", "w8a8") if family in FITTING else ("w8a8",):
        out = quantised(method, folder, tmp_path / method, text)
        after = Harness(load_model(out)).step([(0, prompt)])[0]
        error = float((after - before).norm() / before.norm())
        assert 1e-5 < error < LIMIT[method], method
        if method != "w8a8":  # whose activations are quantised too
            same = Harness(load_model(dense_copy(out, tmp_path / f"{method}-dense"))).step([(0, prompt)])[0]
            torch.testing.assert_close(after, same, atol=2e-3, rtol=1e-3)
