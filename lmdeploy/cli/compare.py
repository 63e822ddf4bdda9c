"""`lmdeploy lite compare`: models and KV policies side by side: quality, memory and speed as a table, a JSON file and a page with plots."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy.cli.flags import FlagParser, add_config_flags, config_from
from lmdeploy.errors import ConfigError
from lmdeploy.lite.compare_options import CompareConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from lmdeploy.lite.compare import Comparison, Row
    from lmdeploy.lite.compare_table import Column

#: One table needs so many columns of the terminal; below, it is cut in two.
WIDE = 150


def add_compare_flags(parser: FlagParser) -> None:
    """Flags of `lite compare`."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL ...",
        help="model folders or hub ids; the first, with a 16-bit KV cache, is the reference (default: the embedded model)",
    )
    add_config_flags(parser, CompareConfig, title="Comparison")


def run_compare(args: argparse.Namespace) -> int:
    """Measure, print, write the files. Ctrl-C prints what was finished."""
    from lmdeploy import log
    from lmdeploy.cli.check_env import machine, versions
    from lmdeploy.lite.compare import Comparer

    log.setup(getattr(args, "log_level", "WARNING"))
    config = config_from(args, CompareConfig)
    comparer = Comparer(getattr(args, "models", []), config)
    comparison = comparer.comparison
    comparison.command = command_line(getattr(args, "models", []), config)
    comparison.machine, comparison.versions = machine(), versions()
    print(describe(comparison))
    try:
        comparer.run()
    except KeyboardInterrupt:
        print_tables(comparison)
        print("interrupted: these rows were finished, and no file was written", file=sys.stderr)
        raise
    print_tables(comparison)
    _write(comparison, config)
    return 0 if any(not row.problem for row in comparison.rows) else 2


def command_line(models: Sequence[str], config: CompareConfig) -> str:
    """The command that gives these results again: only what was given."""
    flags = [word for f in dataclasses.fields(config) if f.name in config.given for word in ("--" + f.name.replace("_", "-"), str(getattr(config, f.name)))]
    return shlex.join(["lmdeploy", "lite", "compare", *models, *flags])


def describe(comparison: Comparison) -> str:
    """What is going to be measured, in two lines."""
    text = comparison.text
    return (
        f"scoring {text['tokens']} tokens in {text['windows']} windows: the end of {text['origin']}\n"
        f"reference: {comparison.reference} with a 16-bit KV cache; KV tokens are counted for {comparison.memory_bytes / 2**30:.3g} GiB"
    )


def print_tables(comparison: Comparison) -> None:
    """One table where the terminal is wide enough, else one of quality and one of cost; what went wrong stands below."""
    from rich.console import Console

    from lmdeploy.lite.compare_table import COST, QUALITY

    console = Console()
    rows = comparison.rows
    for columns in [(*QUALITY, *COST)] if console.width >= WIDE else [QUALITY, COST]:
        _print_table(console, rows, columns)
    problems: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            problems.setdefault(f"{row.model}: {row.problem}", []).append(row.policy)
    for problem, policies in problems.items():
        print(f"KV {', '.join(policies)} of {problem}")


def _print_table(console: Console, rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Every model's name on a line of its own, however long, above its rows; models of which nothing was measured are left out."""
    from lmdeploy.lite.compare_table import cache

    cells = {id(row): [column.cell(row) for column in columns] for row in rows}
    shown = [row for row in rows if row.reference or any(cells[id(row)])]
    names = ["  KV cache", *(f"  {cache(row)}" for row in shown)]
    widths = [max(map(len, names)), *(max([len(column.title), *(len(cells[id(row)][i]) for row in shown)]) for i, column in enumerate(columns))]
    console.print()
    console.print(_lines([["  KV cache", *(column.title for column in columns)]], widths, "dim"))
    for model in dict.fromkeys(row.model for row in shown):
        console.print(model, style="bold", markup=False, highlight=False, soft_wrap=True)
        own = [row for row in shown if row.model == model]
        console.print(_lines([[f"  {cache(row)}", *(text or ("" if row.reference else "-") for text in cells[id(row)])] for row in own], widths))


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int], style: str = "") -> Table:
    """Rows in columns of fixed widths, so that several of these stand below each other as one table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False, style=style)
    for number, width in enumerate(widths):
        table.add_column(justify="right" if number else "left", width=width, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell, style=style) for cell in row))
    return table


def _write(comparison: Comparison, config: CompareConfig) -> None:
    from lmdeploy.lite.compare_html import page

    for target, make in ((config.json, comparison.as_json), (config.html, lambda: page(comparison))):
        if target is None:
            continue
        try:
            Path(target).expanduser().write_text(make(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{target}: cannot be written: {error.strerror or error}") from None
        print(f"written to {target}")
