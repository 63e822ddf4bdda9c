"""Cards, sizes of memory and this CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.plan.machines import CARDS, GIB, MIB, choose_machine, cpu_number_bytes, find_card, parse_memory, read_bandwidth
from lmdeploy.plan.options import PlanConfig


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GIB),
        ("24GiB", 24 * GIB),
        ("24", 24 * GIB),
        (" 24 g", 24 * GIB),
        ("24566MiB", 24566 * MIB),
        ("1.5t", 1536 * GIB),
        ("25759318016B", 25759318016),
    ],
)
def test_memory_is_counted_as_cards_are_sold(text: str, size: int) -> None:
    assert parse_memory(text, "gpu_memory") == size


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "24 PB", "nan", "1e9", "9" * 30])
def test_what_is_no_size_of_memory_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="gpu_memory="):
        parse_memory(text, "gpu_memory")


@pytest.mark.parametrize("name", ["a100-40g", "A100-40GB", "NVIDIA A100 40g", "a100_40g"])
def test_a_card_is_found_however_it_is_spelled(name: str) -> None:
    assert find_card(name) is CARDS["a100-40g"]


def test_geforce_names_and_the_cards_own() -> None:
    assert find_card("NVIDIA GeForce RTX 4090") is CARDS["4090"]
    assert find_card("Tesla T4") is CARDS["t4"]


def test_an_unknown_card_names_the_nearest_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"a100-\d0g.*--gpu-memory"):
        find_card("a100-60g")


def test_every_card_has_a_source_and_sane_figures() -> None:
    for name, card in CARDS.items():
        assert card.source, name
        assert 14 * 1024 < card.memory_mib < 200 * 1024
        assert 200 < card.bandwidth < 5000


def test_named_memory_and_bandwidth_win_over_the_cards() -> None:
    machine = choose_machine(PlanConfig(gpu="4090", gpu_memory="10GB", bandwidth=500.0, gpu_memory_used="2GB"))
    assert (machine.memory, machine.bandwidth, machine.source) == (8 * GIB, 500e9, "--bandwidth")
    assert choose_machine(PlanConfig(gpu_memory="10GB")).bandwidth is None
    with pytest.raises(ConfigError, match="leaves nothing"):
        choose_machine(PlanConfig(gpu_memory="10GB", gpu_memory_used="10GB"))


def test_bandwidth_of_this_cpu_is_that_of_a_memory() -> None:
    assert 1e9 < read_bandwidth(64 * MIB) < 2e12


@pytest.mark.parametrize(("flags", "size"), [("fpu avx512_bf16", 2), ("amx_tile", 2), ("avx2", 4), (None, 4)])
def test_numbers_of_a_cpu_by_its_flags(tmp_path: Path, flags: str | None, size: int) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert cpu_number_bytes(tmp_path / "cpuinfo") == size
