"""The memory bill as a table for people. Imports no torch: a server prints it, and has no use for the rest of the engine."""

from __future__ import annotations

from lmdeploy.engine.sizing import gib
from lmdeploy.messages import MemoryBill


def _gain(bill: MemoryBill) -> str:
    """' (int8: 1.97 times what 16 bit would hold)'; nothing for a cache that is not quantised."""
    if bill.kv_policy == "none":
        return ""
    return f" ({bill.kv_policy}: {bill.bytes_per_token_16bit / bill.bytes_per_token:.3g} times what 16 bit would hold)"


def format_bill(bill: MemoryBill) -> str:
    """The bill as a table for people."""
    tokens = bill.num_blocks * bill.block_size
    cpu = bill.device == "cpu"
    sessions = f"{tokens / bill.session_len:.3g} conversations of session_len={bill.session_len}"
    rows = [
        ("weights", bill.weights, ""),
        ("KV cache", bill.kv_pool, f"{bill.num_blocks} blocks of {bill.block_size} = {tokens} tokens of {bill.bytes_per_token} bytes{_gain(bill)}; {sessions}"),
        ("step workspace", bill.workspace, "activations of the largest step"),
        ("other", bill.other, "interpreter, libraries, kernels" if cpu else "CUDA context, libraries, other processes"),
        ("total", bill.total, "resident memory of the process" if cpu else f"in use on {bill.device}"),
        ("free", bill.free, f"left for others, but for {gib(bill.graphs)} that CUDA graphs will take" if bill.graphs else "left for others"),
    ]
    lines = [f"memory on {bill.device}", *(f"  {name:<15}{gib(size):>10}  {text}".rstrip() for name, size, text in rows)]
    return "\n".join(lines + [f"  note: {note}" for note in bill.note.splitlines()])
