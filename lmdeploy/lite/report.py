"""What a quantising command found out: kept in the checkpoint as JSON, printed as a table at the end."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "quantisation_report.json"


@dataclass(slots=True)
class Report:
    """Sizes in bytes, times in seconds; perplexity is None where it was not measured, and `perplexity_note` says why."""

    model: str
    work_dir: str
    method: str
    calibration: str
    samples: int
    seqlen: int
    group_size: int
    search_scale: bool
    bytes_before: int = 0
    bytes_after: int = 0
    linear_bytes_before: int = 0
    linear_bytes_after: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_note: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """As JSON in the checkpoint."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")

    @property
    def linear_ratio(self) -> float:
        """Bytes of the linear weights, after / before."""
        return self.linear_bytes_after / max(1, self.linear_bytes_before)

    def error_ratio(self) -> float | None:
        """Output error of all layers relative to plain rounding: the mean of the layers' ratios."""
        ratios = [layer["error"] / layer["plain_error"] for layer in self.layers if layer["plain_error"] > 0]
        return sum(ratios) / len(ratios) if ratios else None

    def rows(self) -> list[tuple[str, str]]:
        """The table's rows."""
        out = [
            ("model", self.model),
            ("written to", self.work_dir),
            ("method", self.method),
            ("calibrated with", f"{self.samples} windows of {self.seqlen} tokens of {self.calibration}" if self.samples else "nothing"),
            ("folder", f"{_mb(self.bytes_before)} -> {_mb(self.bytes_after)} ({self.bytes_after / max(1, self.bytes_before):.2f}x)"),
            ("linear weights", f"{_mb(self.linear_bytes_before)} -> {_mb(self.linear_bytes_after)} ({self.linear_ratio:.3f}x)"),
        ]
        if (ratio := self.error_ratio()) is not None:
            out.append(("output error", f"{ratio:.2f}x that of plain rounding, mean over {len(self.layers)} layers"))
        return [*out, ("perplexity", self._perplexity()), ("time", f"{self.seconds:.1f} s"), ("peak memory", _mb(self.peak_bytes))]

    def _perplexity(self) -> str:
        if self.perplexity_before is None or self.perplexity_after is None:
            return f"not measured: {self.perplexity_note}"
        change = 100 * (self.perplexity_after / self.perplexity_before - 1)
        return f"{self.perplexity_before:.3f} -> {self.perplexity_after:.3f} ({change:+.2f} %) on held-out text"


def format_report(report: Report) -> str:
    """The table."""
    return "\n".join(f"{name:<16}{value}" for name, value in report.rows())


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a folder, links followed (the hub's cache is made of them)."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
