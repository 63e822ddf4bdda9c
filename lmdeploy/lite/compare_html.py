"""A comparison as one page: table, plots, and all that is needed to get the numbers again. No scripts, no fonts and nothing else from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from lmdeploy.lite.compare import Comparison, Row
from lmdeploy.lite.compare_table import COST, QUALITY, Column, cache, divergence, megabytes, short
from lmdeploy.lite.svg import Bar, Point, bars, marker, points

#: Colours by policy: told apart by the colour-blind too (Okabe and Ito's set), slightly lighter in the dark.
LIGHT = ("#5b6573", "#0072b2", "#009e73", "#d55e00", "#b8578f", "#8a6d00", "#3a9bd1", "#7a4fb5")
DARK = ("#a3adba", "#4aa8e0", "#2fc79a", "#ff8a3d", "#e08fc0", "#d9b73c", "#7cc7f2", "#b493ea")
#: Tokens of the conversation whose cache is added to the weights in the first plot.
CONTEXT = 4096

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c2024;--soft:#606a75;--line:#e2e5e9;--head:#f3f4f6;--bad:#b42318;--best:#e6f4ee;%LIGHT%}
@media(prefers-color-scheme:dark){:root{--bg:#131517;--card:#1b1e21;--ink:#e8eaed;--soft:#9aa4af;--line:#31363c;--head:#23272b;--bad:#ff8f84;--best:#15382c;%DARK%}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1320px;margin:0 auto;padding:36px 24px 56px}
h1{font-size:27px;line-height:1.2;letter-spacing:-.015em;margin:0 0 6px}
h2{font-size:16px;margin:0 0 2px}
p{margin:0 0 10px}.soft{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:20px}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13px}
th,td{padding:7px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{background:var(--head);font-weight:600;color:var(--soft);font-size:12.5px}
th.l,td.l{text-align:left}td.l{font-weight:600}tr:last-child td{border-bottom:0}
tr.first td{border-top:2px solid var(--line)}td.note{color:var(--bad);text-align:left;white-space:normal;min-width:320px}
td.sub{color:var(--soft);font-weight:400}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:20px;margin-top:20px}.grid2 .card{margin:0}
svg{display:block;width:100%;height:auto;margin-top:10px}svg.key{display:inline-block;width:16px;margin:0 4px 0 0;vertical-align:-3px}
svg text{font-size:12px;fill:var(--soft)}svg text.g{font-size:12.5px;font-weight:600;fill:var(--ink)}svg text.v{fill:var(--ink);font-variant-numeric:tabular-nums}
svg text.n{text-anchor:end}svg text.m{text-anchor:middle}
.k{fill:var(--soft)}.axis{stroke:var(--soft);stroke-width:1}.grid{stroke:var(--line);stroke-width:1}.err{stroke:var(--ink);stroke-width:1.2;fill:none;opacity:.75}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:8px;font-size:13px;color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:8px 0 0;font-size:13.5px}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
%CLASSES%
"""


def page(comparison: Comparison) -> str:
    """The whole document."""
    title = "Model comparison"
    parts = [_head(comparison), _table(comparison.rows), _plots(comparison), _meanings(comparison), _origin(comparison)]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
        f"<style>{_style()}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _style() -> str:
    """STYLE with the policies' colours, as fill and as background."""
    light, dark = ("".join(f"--c{i}:{c};" for i, c in enumerate(colours)) for colours in (LIGHT, DARK))
    classes = "".join(f".c{i}{{fill:var(--c{i});background:var(--c{i})}}" for i in range(len(LIGHT)))
    return STYLE.replace("%LIGHT%", light).replace("%DARK%", dark).replace("%CLASSES%", classes).strip()


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Policy -> colour class, in order of appearance."""
    return {policy: f"c{i % len(LIGHT)}" for i, policy in enumerate(dict.fromkeys(row.policy for row in rows))}


def _e(words: object) -> str:
    return html.escape(str(words))


def _head(comparison: Comparison) -> str:
    models, text = len({row.model for row in comparison.rows}), comparison.text
    what = f"{models} model{'s' if models != 1 else ''}, {len(comparison.rows)} combinations of weights and KV cache, one by one on the same {text['tokens']:,} tokens"
    return (
        f"<h1>Quality, memory and speed</h1><p class=soft>{_e(what)}. Reference: <b>{_e(comparison.reference)}</b> with a 16-bit KV cache. "
        f"{_e(comparison.created.replace('T', ' ').replace('+00:00', ' UTC'))}, {_e(comparison.machine.get('cpu', 'unknown machine'))}.</p>"
    )


def _table(rows: Sequence[Row]) -> str:
    columns, colours = (*QUALITY, *COST), _colours(rows)
    head = "".join(f'<th title="{_e(column.meaning)}">{_e(column.title)}</th>' for column in columns)
    body = "".join(_group([row for row in rows if row.model == model], columns, colours) for model in dict.fromkeys(row.model for row in rows))
    return f'<div class="card scroll"><table><thead><tr><th class=l>model</th><th class=l>KV cache</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _group(rows: Sequence[Row], columns: Sequence[Column], colours: dict[str, str]) -> str:
    """The rows of one model; a problem that all of them have is written once."""
    shared = len({row.problem for row in rows}) == 1 and rows[0].scores is None and len(rows) > 1
    lines = []
    for number, row in enumerate(rows):
        name = f'<td class=l title="{_e(row.folder)}">{_e(row.model)}</td>' if number == 0 else "<td class=l></td>"
        cells = "".join(f"<td>{_e(column.cell(row))}</td>" for column in columns)
        if row.problem and row.scores is None:
            measured = any(row.kv_tokens for row in rows)
            note = f"<td class=note colspan={len(QUALITY) if measured else len(columns)} rowspan={len(rows) if shared else 1}>{_e(row.problem)}</td>"
            costs = "".join(f"<td>{_e(column.cell(row))}</td>" for column in COST) if measured else ""
            cells = ("" if shared and number else note) + costs
        dot = f'<td class="l sub"><span class="dot {colours[row.policy]}"></span>{_e(cache(row))}</td>'
        lines.append(f"<tr{' class=first' if number == 0 else ''}>{name}{dot}{cells}</tr>")
    return "".join(lines)


def _plots(comparison: Comparison) -> str:
    """Every plot that has something to show."""
    rows = comparison.rows
    cards = [
        _scatter(rows),
        _bars(rows, "Perplexity", "change against the reference in percent; lines show standard errors", _change, _change_text, _change_error),
        _bars(rows, "Decode speed", "tokens/s of one answer alone; longer is better", lambda r: r.speed.decode if r.speed else 0, _rate),
        _bars(rows, "Prefill speed", "tokens/s of one prompt alone; longer is better", lambda r: r.speed.prefill if r.speed else 0, _rate),
        _bars(rows, "KV tokens", f"that fit into {comparison.memory_bytes / 2**30:.3g} GiB beside the weights; longer is better", lambda r: r.kv_tokens, _rate),
        _bars(rows, "Memory of the weights", "shorter is better", lambda r: r.weight_bytes if r.policy == "0" else 0, megabytes),
    ]
    return f'<div class="grid2">{"".join(card for card in cards if card)}</div>'


def _rate(value: float) -> str:
    return short(value)


def _change(row: Row) -> float:
    ratio = row.scores.ratio if row.scores else None
    return 0.0 if ratio is None or not math.isfinite(ratio) else 100 * (ratio - 1)


def _change_error(row: Row) -> float:
    error = row.scores.ratio_se if row.scores else None
    return 0.0 if error is None or not math.isfinite(error) else 100 * error


def _change_text(value: float) -> str:
    return f"{value:+.2f} %"


def _no_error(_: Row) -> float:
    return 0.0


def _bars(
    rows: Sequence[Row], title: str, subtitle: str, value: Callable[[Row], float], text: Callable[[float], str], error: Callable[[Row], float] = _no_error
) -> str:
    colours = _colours(rows)
    items = [Bar(row.model, cache(row), colours[row.policy], value(row), text(value(row)), error(row)) for row in rows if value(row)]
    if not items:
        return ""
    return f"<section class=card><h2>{_e(title)}</h2><p class=soft>{_e(subtitle)}</p>{bars(items, f'{title}: {subtitle}')}</section>"


def _scatter(rows: Sequence[Row]) -> str:
    """KL divergence against the memory for weights and one conversation."""
    good = [row for row in rows if row.reference or (row.scores is not None and row.scores.kl is not None and math.isfinite(row.scores.kl))]
    good = [row for row in good if row.weight_bytes]
    if len(good) < 2:
        return ""
    colours, models = _colours(rows), list(dict.fromkeys(row.model for row in good))
    unit, name = (1e9, "GB") if max(row.weight_bytes for row in good) >= 1e9 else (1e6, "MB")
    items = [
        Point(
            (row.weight_bytes + CONTEXT * row.kv_bytes_per_token) / unit,
            (row.scores.kl or 0.0) if row.scores else 0.0,
            (row.scores.kl_se or 0.0) if row.scores else 0.0,
            colours[row.policy],
            models.index(row.model),
            f"{row.model}, KV {cache(row)}: {divergence(row) or 'reference'}",
        )
        for row in good
    ]
    policies = list(dict.fromkeys((cache(row), colours[row.policy]) for row in good))
    legend = "".join(f"<span>{marker('k', i)}{_e(model)}</span>" for i, model in enumerate(models))
    legend += "".join(f'<span><i class="dot {colour}"></i>KV {_e(policy)}</span>' for policy, colour in policies)
    plot = points(items, f"{name} of weights and the KV cache of {CONTEXT:,} tokens", "mean KL divergence, nats", "0")
    return (
        f"<section class=card><h2>Quality against memory</h2><p class=soft>lower and further left is better</p>{plot}<div class=legend>{legend}</div></section>"
    )


def _meanings(comparison: Comparison) -> str:
    rows = "".join(f"<dt>{_e(column.title)}</dt><dd>{_e(column.meaning)}</dd>" for column in (*QUALITY, *COST))
    speeds = [row.speed for row in comparison.rows if row.speed]
    how = ""
    if speeds:
        runs = min(s.runs for s in speeds)
        how = f"<p class=soft>Speeds: one request of {speeds[0].prompt_tokens} tokens at a time, medians of at least {runs} runs; other programs make them lower.</p>"
    return f"<section class=card><h2>What the columns mean</h2><dl>{rows}</dl><br>{how}</section>"


def _origin(comparison: Comparison) -> str:
    """Machine, versions, text, command."""
    text = comparison.text
    facts = {
        **comparison.machine,
        "text": f"the last {text['tokens']:,} tokens of {text['origin']} in {text['windows']} windows, each from a fresh start",
        "computed in": ", ".join(dict.fromkeys(f"{row.dtype} on {row.device}" for row in comparison.rows if row.dtype)),
        "versions": ", ".join(f"{name} {version}" for name, version in comparison.versions.items() if not version.startswith("missing")),
        "date": comparison.created,
    }
    rows = "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in facts.items())
    return f"<section class=card><h2>Where the numbers are from</h2><dl>{rows}<dt>command</dt><dd><code>{_e(comparison.command)}</code></dd></dl></section>"
