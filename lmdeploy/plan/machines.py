"""Machines that a plan is made for: known cards with the source of their figures, and this CPU."""

from __future__ import annotations

import difflib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.engine.host_memory import host_free
from lmdeploy.errors import ConfigError
from lmdeploy.plan.options import PlanConfig

MIB, GIB = 1 << 20, 1 << 30
#: What a process takes beside weights, workspace and pool, measured. CPU: 284 to 312 MiB (interpreter, torch, kernels). CUDA: 747 to 794 MiB on an H200 (context,
#: libraries, compiled kernels), where four engines of two sizes were started; smaller cards have smaller contexts.
CPU_OTHER, CUDA_OTHER = 320 * MIB, 768 * MIB
#: share by which a card's memory may differ from the size that it is sold as
SOLD_AS = 0.07
SHEET = "NVIDIA's data sheet"
BUS = "bus width x data rate"


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: MiB as nvidia-smi shows them, GB/s, and where the latter come from."""

    memory_mib: int
    bandwidth: float
    source: str
    capability: tuple[int, int]


CARDS: dict[str, Card] = {
    "h200": Card(143771, 4580, "measured, read only; 4800 by NVIDIA's data sheet", (9, 0)),
    "h100": Card(81559, 3350, SHEET, (9, 0)),
    "h100-pcie": Card(81559, 2000, SHEET, (9, 0)),
    "a100-80g": Card(81920, 2039, SHEET, (8, 0)),
    "a100-40g": Card(40960, 1555, SHEET, (8, 0)),
    "v100-32g": Card(32768, 900, SHEET, (7, 0)),
    "l40s": Card(46068, 864, f"{BUS}, 384 bit x 18 Gbit/s", (8, 9)),
    "l4": Card(23034, 300, f"{BUS}, 192 bit x 12.5 Gbit/s", (8, 9)),
    "a10": Card(23028, 600, f"{BUS}, 384 bit x 12.5 Gbit/s", (8, 6)),
    "a6000": Card(49140, 768, f"{BUS}, 384 bit x 16 Gbit/s", (8, 6)),
    "t4": Card(15360, 320, f"{BUS}, 256 bit x 10 Gbit/s", (7, 5)),
    "5090": Card(32607, 1792, f"{BUS}, 512 bit x 28 Gbit/s", (12, 0)),
    "4090": Card(24564, 1008, f"{BUS}, 384 bit x 21 Gbit/s", (8, 9)),
    "3090": Card(24576, 936, f"{BUS}, 384 bit x 19.5 Gbit/s", (8, 6)),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """One rank's device. `memory` is what the engine's process may take, `other` what it takes beside weights, workspace and KV pool; bytes."""

    name: str
    cpu: bool
    memory: int
    other: int
    bandwidth: float | None  # bytes/s; None = not known
    source: str  # of the bandwidth
    capability: tuple[int, int] | None
    cards: tuple[str, ...] = ()  # where the bandwidth is not known: known cards with so much memory


def choose_machine(config: PlanConfig) -> Machine:
    """The card that is named or described, else this CPU."""
    used = parse_memory(config.gpu_memory_used, "gpu_memory_used")
    if config.gpu is None and config.gpu_memory is None:
        return this_cpu(config.bandwidth)
    card = find_card(config.gpu) if config.gpu is not None else None
    total = parse_memory(config.gpu_memory, "gpu_memory") if config.gpu_memory is not None else card.memory_mib * MIB if card else 0
    if used >= total:
        raise ConfigError(f"gpu_memory_used={config.gpu_memory_used} leaves nothing of the card's {total / GIB:.4g} GiB")
    speed, source = (config.bandwidth, "--bandwidth") if config.bandwidth else (card.bandwidth, card.source) if card else (None, "")
    name = f"{config.gpu or 'GPU'} with {total / GIB:.4g} GiB" + (f", {used / GIB:.3g} GiB of them in use" if used else "")
    # a card that is only described is taken for a recent one
    return Machine(
        name, False, total - used, CUDA_OTHER, speed and speed * 1e9, source, card.capability if card else (8, 9), () if speed else cards_with(total)
    )


def cards_with(memory: int) -> tuple[str, ...]:
    """Cards of the table that are sold with so many bytes, the fastest first. What drivers show is a few per cent less than that."""
    found = [name for name, card in CARDS.items() if abs(card.memory_mib * MIB - memory) <= SOLD_AS * memory]
    return tuple(sorted(found, key=lambda name: -CARDS[name].bandwidth))


def find_card(name: str) -> Card:
    """A card of the table, however it is spelled: 'A100-40G', 'rtx 4090', 'NVIDIA L4'."""
    key = re.sub(r"^(nvidia-)?(geforce-|tesla-)?(rtx-?)?", "", re.sub(r"[\s_]+", "-", name.strip().lower()))
    key = re.sub(r"(\d)gb$", r"\1g", key)
    if key not in CARDS:
        near = difflib.get_close_matches(key, CARDS, 3, cutoff=0.4)
        raise ConfigError(
            f"gpu={name!r} is not in the table; {'did you mean ' + ' or '.join(near) if near else 'known: ' + ', '.join(CARDS)}? "
            "Any other: --gpu-memory and --bandwidth"
        )
    return CARDS[key]


def parse_memory(text: str, field: str) -> int:
    """Bytes of '24GB', '24GiB', '24566MiB', '24' (GB) or '25759318016B'; GB and MB are powers of two, as cards are sold and nvidia-smi counts."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])i?b?|(b))?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{field}={text!r} is no size of memory; write it as 24GB or 24566MiB")
    unit = "B" if found[3] else (found[2] or "G").upper()
    count = float(found[1]) * {"B": 1, "K": 1 << 10, "M": MIB, "G": GIB, "T": GIB << 10}[unit]
    if count >= 1 << 60:
        raise ConfigError(f"{field}={text!r} is more than any memory")
    return int(count)


def this_cpu(bandwidth: float | None) -> Machine:
    """This machine's processor and what is free of its memory now."""
    speed, source = (bandwidth * 1e9, "--bandwidth") if bandwidth else (read_bandwidth(), "measured now, a read of 128 MiB by all threads")
    free = host_free()
    return Machine(f"this CPU, {free / GIB:.3g} GiB free", True, free, CPU_OTHER, speed, source, None)


def read_bandwidth(size: int = 128 * MIB, repeats: int = 3) -> float:
    """Bytes/s at which all threads of this process together read memory; the best of a few reads."""
    import numpy as np

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    part = size // count // 4
    with ThreadPoolExecutor(count) as pool:
        arrays = list(pool.map(lambda _: np.ones(part, dtype=np.float32), range(count)))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(lambda x: float(np.dot(x, x)), arrays))
            seconds.append(time.perf_counter() - start)
    return count * part * 4 / min(seconds)


def cpu_number_bytes(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """Bytes of a number of dtype='auto' on this CPU: bfloat16 where it is multiplied in hardware, else float32."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 4
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return 2 if "avx512_bf16" in flags or "amx_tile" in flags else 4
