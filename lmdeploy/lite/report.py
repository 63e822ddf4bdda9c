"""What a quantising command found out: kept in the checkpoint as JSON and as Markdown for the model's card, printed as a table at the end.

`quantisation_report.json` is one object whose keys are the fields of `Report`, with its units. A later version may add keys and never changes one; null means
not measured, and the note beside it says why.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "quantisation_report.json"
CARD = "quantisation_report.md"


@dataclass(slots=True)
class Report:
    """Sizes in bytes, times in seconds, speeds in tokens/s of one request alone; what was not measured is None, and `perplexity_note` says why.

    model, work_dir: folders. method: in words. calibration, samples, seqlen: the text, and how many windows of how many tokens. group_size: weights that
    share a scale. bytes_...: all files of the folder; linear_bytes_...: the linear weights of the layers alone. peak_bytes: largest resident set.
    perplexity_..., kl, top1: on `evaluated_tokens` held-out tokens, computed as `evaluated_on` says; see `scores.Scores` for their definitions.
    kl_activations: what 8-bit activations add to kl, i.e. kl minus that of the same folder with 16-bit activations.
    layers: {layer, plain_error, error}, output errors relative to the outputs. warnings: what the user was told.
    """

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
    perplexity_ratio_se: float | None = None
    perplexity_note: str = ""
    kl: float | None = None
    kl_se: float | None = None
    kl_p99: float | None = None
    kl_activations: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    evaluated_tokens: int = 0
    evaluated_on: str = ""
    prefill_before: float | None = None
    prefill_after: float | None = None
    decode_before: float | None = None
    decode_after: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """As JSON and Markdown in the checkpoint."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")
        (folder / CARD).write_text(self.card(), encoding="utf-8")

    def card(self) -> str:
        """A section for a model card."""
        rows = [f"| {name} | {value} |" for name, value in self.rows() if name != "written to"]
        return "\n".join(["## Quantisation", "", "| | |", "|---|---|", *rows, *(f"\n> {warning}" for warning in self.warnings)]) + "\n"

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
        out.append(("perplexity", self._perplexity()))
        if self.kl is not None:
            out += self._divergence()
        if self.decode_before is not None and self.decode_after is not None:
            out += [("decode", _speeds(self.decode_before, self.decode_after)), ("prefill", _speeds(self.prefill_before or 0, self.prefill_after or 0))]
        return [*out, ("time", f"{self.seconds:.1f} s"), ("peak memory", _mb(self.peak_bytes))]

    def _perplexity(self) -> str:
        if self.perplexity_before is None or self.perplexity_after is None:
            return f"not measured: {self.perplexity_note}"
        change = 100 * (self.perplexity_after / self.perplexity_before - 1)
        error = "" if self.perplexity_ratio_se is None else f" \u00b1 {100 * self.perplexity_ratio_se:.2f}"
        where = f"on {self.evaluated_tokens} held-out tokens, {self.evaluated_on}" if self.evaluated_tokens else "on held-out text"
        return f"{self.perplexity_before:.3f} -> {self.perplexity_after:.3f} ({change:+.2f}{error} %) {where}"

    def _divergence(self) -> list[tuple[str, str]]:
        """Against the model before; called when it was measured."""
        assert None not in (self.kl, self.kl_se, self.kl_p99, self.top1, self.top1_se)
        activations = "" if self.kl_activations is None else f"; 8-bit activations add {self.kl_activations:.5f} of it"
        return [
            ("KL divergence", f"{self.kl:.5f} \u00b1 {self.kl_se:.5f} nats a token, 99 % below {self.kl_p99:.3g}{activations}"),
            ("same top token", f"{100 * (self.top1 or 0):.2f} \u00b1 {100 * (self.top1_se or 0):.2f} %"),
        ]


def format_report(report: Report) -> str:
    """The table."""
    return "\n".join(f"{name:<16}{value}" for name, value in report.rows())


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a folder, links followed (the hub's cache is made of them)."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def _speeds(before: float, after: float) -> str:
    return f"{before:.1f} -> {after:.1f} tok/s ({after / before:.2f}x), one request alone" if before > 0 else "not measured"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
