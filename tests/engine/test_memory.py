"""The memory bill against readings from outside, and control groups as files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lmdeploy.engine.bill import format_bill
from lmdeploy.engine.host_memory import cgroup_rooms
from lmdeploy.engine.memory import PoolShape, free_bytes, make_bill, taken_bytes
from lmdeploy.messages import MemoryBill

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def status_rss() -> int:
    """Resident bytes as the kernel prints them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_taken_memory_is_the_resident_set() -> None:
    assert taken_bytes(CPU) == pytest.approx(status_rss(), rel=0.01)


def test_free_memory_is_never_more_than_the_machine_has_available() -> None:
    before = psutil.virtual_memory().available
    found = free_bytes(CPU)
    # other programs, other tests among them, take and give memory meanwhile
    assert 0 < found <= max(before, psutil.virtual_memory().available) + (64 << 20)


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_every_limit_of_a_version_2_group_and_its_parents_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/box/app\n")
    write_group(tmp_path / "box", memory__max="1000", memory__current="900", memory__stat="anon 500\ninactive_file 300\n")
    write_group(tmp_path / "box" / "app", memory__max="max", memory__current="900", memory__stat="inactive_file 0\n")
    assert cgroup_rooms(tmp_path / "cgroup", tmp_path) == [400]
    write_group(tmp_path / "box" / "app", memory__max="700")
    assert cgroup_rooms(tmp_path / "cgroup", tmp_path) == [0, 400]


def test_version_1_groups_are_read_and_no_limit_is_no_room(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n")
    write_group(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5", memory__stat="total_inactive_file 1\n")
    write_group(tmp_path / "memory" / "box", memory__limit_in_bytes="5000", memory__usage_in_bytes="2000", memory__stat="total_inactive_file 100\n")
    assert cgroup_rooms(tmp_path / "cgroup", tmp_path) == [3100]
    assert cgroup_rooms(tmp_path / "missing", tmp_path) == []


def test_the_parts_of_a_bill_add_up_to_the_total() -> None:
    bill = make_bill(CPU, (10 << 20, 20 << 20, 5 << 20), PoolShape(80, 64, 4096, 4096), 2048, "")
    assert bill.weights + bill.kv_pool + bill.workspace + bill.other == bill.total
    assert bill.total == pytest.approx(status_rss(), rel=0.02) and bill.free > 0


def test_the_bill_is_printed_line_by_line() -> None:
    mib = 1 << 20
    bill = MemoryBill(
        device="cpu", weights=38 * mib, kv_pool=320 * mib, workspace=12 * mib, other=250 * mib, total=620 * mib, free=20 << 30, num_blocks=1024, block_size=64,
        bytes_per_token=5120, session_len=2048, note="first\nsecond",
    )  # fmt: skip
    text = format_bill(bill)
    for part in (
        "weights            38 MiB",
        "KV cache          320 MiB",
        "1024 blocks of 64 = 65536 tokens of 5120 bytes",
        "32 conversations of session_len=2048",
    ):
        assert part in text
    for part in (
        "step workspace     12 MiB",
        "other             250 MiB",
        "total             620 MiB",
        "free               20 GiB",
        "note: first\n  note: second",
    ):
        assert part in text


LONG_RUN = """
import sys
import torch
from pathlib import Path
from lmdeploy.config import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.memory import taken_bytes
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineRequest, SamplingParams

config = {"turbomind": TurbomindEngineConfig, "pytorch": PytorchEngineConfig}[sys.argv[2]](
    cache_max_entry_count=300, max_batch_size=8, dtype=sys.argv[3], device_type="cpu"
)
engine = build_engine(Path(sys.argv[1]), config)
told = engine.info.memory.total
print(taken_bytes(torch.device("cpu")) / told)
for turn in range(2):
    for number in range(4):
        ids = [(7 * k + number + turn) % 5000 for k in range(300 * (1 + number % 4))]
        sampling = SamplingParams(
            max_new_tokens=24, temperature=0.8 * (number % 2), top_k=0 if number % 3 else 50, top_p=0.9, seed=number, frequency_penalty=0.1,
            repetition_penalty=1.1, logprobs=5, prompt_logprobs=1 if number == 3 else None,
        )
        engine.add(EngineRequest(request_id=100 * turn + number, token_ids=ids, sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
    print(taken_bytes(torch.device("cpu")) / told)
"""


@pytest.mark.parametrize(("backend", "dtype"), [("turbomind", "auto"), ("pytorch", "float32"), ("pytorch", "bfloat16")])
def test_the_bill_stays_true_to_two_percent_through_long_requests(backend: str, dtype: str, model_folder: Path) -> None:
    command = [sys.executable, "-c", LONG_RUN, str(model_folder), backend, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shares = [float(line) for line in done.stdout.split()]
    assert len(shares) == 3 and all(abs(share - 1) < 0.02 for share in shares), shares
