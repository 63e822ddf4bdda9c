"""`lmdeploy plan`: what a model takes, what fits, how fast it can be, and the command line for it, before anything is loaded.

Exit code 0: the options as given hold the conversations asked for; 3: they do not, and the page says what would.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from lmdeploy import log
from lmdeploy.cli.flags import FlagParser, add_config_flags, add_model_flag, config_from, config_values
from lmdeploy.config import EngineConfig, TurbomindEngineConfig
from lmdeploy.plan.options import ENGINE_OPTIONS, PlanConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.text import Text

    from lmdeploy.plan.fit import Fit
    from lmdeploy.plan.plan import Plan

DOES_NOT_FIT = 3


def add_plan_flags(parser: FlagParser) -> None:
    """Flags of `plan`."""
    add_model_flag(parser)
    add_config_flags(parser, PlanConfig, title="Machine and purpose")
    add_config_flags(parser, EngineConfig, title="Engine, as in `serve api_server`", only=ENGINE_OPTIONS)


def run_plan(args: argparse.Namespace) -> int:
    """Compute and print."""
    log.setup(getattr(args, "log_level", "ERROR"))
    wanted = config_from(args, PlanConfig)
    if wanted.gpu == "list":
        print_cards()
        return 0
    from lmdeploy.plan.plan import make_plan

    values = {name: value for name, value in config_values(args, EngineConfig).items() if name in ENGINE_OPTIONS}
    plan = make_plan(args.model_path, TurbomindEngineConfig(**values), wanted)
    if wanted.json:
        print(json.dumps({**dataclasses.asdict(plan), "fits": plan.fits}, indent=2))
    else:
        print_plan(plan)
    return 0 if plan.fits else DOES_NOT_FIT


def print_cards() -> None:
    """The table behind --gpu."""
    from lmdeploy.plan.machines import CARDS

    print_table(
        _console(), ["--gpu", "MiB", "GB/s", "source of GB/s"], [[n, str(c.memory_mib), f"{c.bandwidth:g}", c.source] for n, c in CARDS.items()], left=3
    )


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], left: int | None = None) -> None:
    """Columns as wide as their texts, numbers to the right; column 0 and column `left` to the left. Cells may have rich's markup.

    Where the terminal is narrower than the table every row is a paragraph of its own.
    """
    from rich.table import Table
    from rich.text import Text

    cells = [[Text.from_markup(cell) for cell in row] for row in rows]
    widths = [max([len(head), *(row[i].cell_len for row in cells)]) for i, head in enumerate(heads)]
    if sum(widths) + 2 * len(widths) > console.width:
        _print_paragraphs(console, heads, cells)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number in (0, left) else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console.print(table)
    console.print()


def _print_paragraphs(console: Console, heads: Sequence[str], cells: Sequence[Sequence[Text]]) -> None:
    console.print(heads[0], style="dim")
    for row in cells:
        console.print(row[0])
        for head, cell in zip(heads[1:], row[1:], strict=True):
            if cell.plain:
                console.print("  ", f"{head}: " if head else "", cell, sep="", soft_wrap=True)
    console.print()


def print_plan(plan: Plan) -> None:
    """The whole page."""
    console = _console()
    console.print(f"[bold]{_plain(plan.model)}[/]", soft_wrap=True)
    console.print(f"{_plain(plan.architecture)}, {plan.parameters / 1e9:.3g} billion parameters, on {plan.device}{_ranks(plan)}\n", soft_wrap=True)
    _print_weights(console, plan)
    _print_policies(console, plan)
    _print_bill(console, plan)
    _print_speed(console, plan)
    _print_grid(console, plan)
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {_plain(note)}", soft_wrap=True)
    _print_verdict(console, plan)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _ranks(plan: Plan) -> str:
    return f", {plan.chosen.tp} of them (figures for each)" if plan.chosen.tp > 1 else ""


def _print_weights(console: Console, plan: Plan) -> None:
    from lmdeploy.engine.sizing import gib

    rows = [[row.part, *map(gib, row.nbytes)] for row in plan.parts]
    totals = [gib(sum(row.nbytes[i] for row in plan.parts)) for i in range(len(plan.storages))]
    print_table(console, ["weights", *plan.storages], [*rows, ["[bold]total[/]", *(f"[bold]{t}[/]" for t in totals)]])


def _print_policies(console: Console, plan: Plan) -> None:
    rows = []
    for row in plan.policies:
        flag = "fp8" if row.policy == 16 else str(row.policy)
        rows.append([_kv(row.name), flag, f"{row.bytes_per_token:,}", f"{row.gain:.2f}", f"{row.tokens:,}", _rate(row.conversations)])
    print_table(console, ["KV cache", "--quant-policy", "bytes a token", "gain", "tokens", f"x {plan.session_len}"], rows)


def _kv(name: str) -> str:
    return "16 bit" if name == "none" else name.removeprefix("rotated ")


def _print_bill(console: Console, plan: Plan) -> None:
    from lmdeploy.engine.sizing import gib

    fit = plan.chosen
    free = plan.memory - fit.weight_bytes - fit.other - fit.workspace - fit.kv_pool
    rows = [
        ["weights", gib(fit.weight_bytes), fit.weights],
        ["KV cache", gib(fit.kv_pool), f"{fit.num_blocks} blocks, {fit.tokens:,} tokens"],
        ["step workspace", gib(fit.workspace), "estimate; measured at start"],
        ["other", gib(fit.other), "interpreter, libraries: usual" if "CPU" in plan.device else "CUDA context, libraries: usual"],
        ["free" if free >= 0 else "[red]missing[/]", gib(abs(free)), f"of {gib(plan.memory)}"],
    ]
    print_table(console, ["memory with these options", "", ""], rows, left=2)
    lengths = ", ".join(f"{count} x {length}" for length, count in plan.lengths)
    console.print(f"conversations at once, by length: {lengths}\n", soft_wrap=True)


def _print_speed(console: Console, plan: Plan) -> None:
    if plan.bandwidth is None:
        _print_cards(console, plan)
        return
    rows = []
    for row in plan.speed:
        expected = "" if row.share is None else _rate(row.ceiling * row.share)
        share = "not measured" if row.share is None else f"{row.share:.0%}"
        rows.append([str(row.batch), f"{row.nbytes / 1e9:.3g} GB", _rate(row.ceiling), share, expected or "-", "" if row.fits else "KV does not fit"])
    print_table(console, ["batch", "read a step", "ceiling tok/s", "reached", "expected", ""], rows, left=5)
    console.print(
        f"[dim]ceiling: {plan.bandwidth / 1e9:.4g} GB/s ({_plain(plan.bandwidth_source)}) over the bytes of a decode step, {plan.speed_context} tokens of context "
        f"each; reached: what benchmark/RESULTS.md measured, on a Sapphire Rapids with AMX[/]\n",
        soft_wrap=True,
    )


def _print_cards(console: Console, plan: Plan) -> None:
    """Without a bandwidth: what the known cards of this memory could do."""
    if not plan.cards:
        console.print("speed: no card of the table has this memory; --bandwidth GB/s or --gpu NAME would tell\n")
        return

    def head(batch: int) -> str:
        return f"batch {batch}" + ("" if batch * plan.speed_context <= plan.chosen.tokens else ", no room for its KV")

    heads = ["decode ceiling, tok/s", "GB/s", *map(head, plan.card_batches), "source of GB/s"]
    rows = [[card.card, f"{card.bandwidth / 1e9:.4g}", *map(_rate, card.ceilings), _plain(card.source)] for card in plan.cards]
    print_table(console, heads, rows, left=len(heads) - 1)
    console.print(
        f"[dim]cards of the table with this memory; ceiling: GB/s over the bytes of a decode step, {plan.speed_context} tokens of context each. "
        "--gpu NAME chooses one, --bandwidth GB/s tells another's[/]\n",
        soft_wrap=True,
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_grid(console: Console, plan: Plan) -> None:
    """Weights and KV policies downwards, ranks to the right."""
    ranks = list(dict.fromkeys(fit.tp for fit in plan.grid))
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for fit in plan.grid:
        rows.setdefault((fit.weights, _kv(fit.kv)), {})[fit.tp] = _cell(fit, plan)
    heads = ["weights", "KV", *(f"{n} GPU{'s' * (n > 1)}" if "CPU" not in plan.device else "fits" for n in ranks)]
    print_table(console, heads, [[weights, kv, *(cells.get(n, "-") for n in ranks)] for (weights, kv), cells in rows.items()], left=1)


def _cell(fit: Fit, plan: Plan) -> str:
    from lmdeploy.engine.sizing import gib

    return f"[red]+{gib(fit.missing)}[/]" if fit.missing else f"[green]{fit.conversations} x {plan.context}[/]"


def _print_verdict(console: Console, plan: Plan) -> None:
    from lmdeploy.plan.plan import asked, shortage

    if plan.fits:
        console.print(f"[bold green]fits:[/] {asked(plan)}", soft_wrap=True)
    else:
        console.print(f"[bold red]does not fit:[/] {_plain(shortage(plan))}", soft_wrap=True)
    if plan.advice is None:
        return
    if plan.advice.obstacle:
        console.print(f"{_plain(plan.advice.obstacle)}; once it is:", soft_wrap=True)
    for command in plan.advice.commands:
        console.print(command, style="bold", markup=False, soft_wrap=True)
