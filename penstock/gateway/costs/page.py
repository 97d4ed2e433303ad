"""A report as one HTML file: no network, no scripts, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from penstock.gateway.policy.amounts import NANO

from . import charts, records
from .charts import Bar
from .findings import Finding
from .read import Found
from .report import Line, Report
from .show import NONE, heads, shortened, shown, without_days
from .words import money, percent, plain, span

_COLUMNS = {
    "requests": "requests",
    "input_tokens": "tokens in",
    "output_tokens": "tokens out",
    "cached_tokens": "cached",
    "dollars": "charged",
    "lost_dollars": "lost attempts",
    "idle_dollars": "share of idle",
    "cost_dollars": "cost",
    "idle_share": "idle share",
    "self_hosted_dollars": "self-hosted",
    "comparator_dollars": "cloud",
    "break_even_utilization": "break-even",
    "escalation_rate": "escalated",
    "attempt_dollars": "attempts in vain",
    "escalated_dollars": "after escalation",
    "unverified_requests": "unverified",
    "outcomes": "outcomes",
    "dollars_per_success": "per success",
}
"""Figures of records.FIGURES → heads of the table; those that are nowhere known are left out."""
_BARS = 12
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_KINDS = {
    "idle_devices": "A device that waits",
    "large_model": "A large model where a small one may do",
    "no_prefix_hits": "No prefix hits",
    "unbounded": "Unbounded answers",
    "untagged": "A key without a feature",
    "unused_context": "A context that nobody needs",
    "many_features": "A feature for each user",
}
_LONGEST = 60
"""Characters of a label."""

_CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#d5dae0;--card:#f5f7f9;
--charged:#0b6e99;--idle:#e0a13a;--cloud:#7a4fb5;--bad:#a8231c}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e8ec;--dim:#9aa5b1;--line:#323a43;
--card:#1d2228;--charged:#4aa8d0;--idle:#c98f2e;--cloud:#b08ae0;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:72rem;margin:0 auto;padding:1.25rem}
h1{font-size:1.6rem;margin:0 0 .25rem}h2{font-size:1.2rem;margin:2rem 0 .6rem}p{margin:.4rem 0}
.dim{color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.verdict{border-left:4px solid var(--charged);background:var(--card);padding:.6rem .9rem;margin:.6rem 0;
font-size:1.05rem}
.verdict.bad{border-color:var(--bad)}
.chart{max-width:46rem;margin:.5rem 0}.label{margin-top:.55rem;font-size:.95rem;overflow-wrap:anywhere}
svg{display:block;width:100%}svg.row{height:1.6rem}svg.columns{height:11rem}
.ends{display:flex;justify-content:space-between;color:var(--dim);font-size:.9rem}
svg .track{fill:var(--card)}svg .charged{fill:var(--charged)}svg .idle{fill:var(--idle)}
svg .cloud{fill:var(--cloud)}svg .mark{fill:var(--cloud)}
.key span{display:inline-block;margin-right:1.1rem;white-space:nowrap}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.35rem;
vertical-align:-.08rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--dim);font-weight:600}
th.name,td.name{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:7.5rem}
tr.total td{font-weight:700;border-bottom:0}
.finding{border:1px solid var(--line);border-radius:.5rem;
padding:.6rem .9rem;margin:.6rem 0;overflow-wrap:anywhere}
.finding h3{font-size:1rem;margin:0;display:flex;gap:1rem;justify-content:space-between}
@media (max-width:40rem){
main{padding:.9rem}.scroll{overflow:visible}
table.cardy thead{display:none}
table.cardy,table.cardy tbody,table.cardy tr,table.cardy td{display:block;width:100%}
table.cardy tr{border:1px solid var(--line);border-radius:.5rem;margin:.6rem 0;padding:.4rem .8rem}
table.cardy td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.15rem 0;text-align:right;
white-space:normal;overflow-wrap:anywhere}
table.cardy td::before{content:attr(data-head);color:var(--dim);text-align:left;flex:none}
table.cardy td.none{display:none}}
@media print{.finding,.verdict,tr{break-inside:avoid}}
"""


def page(
    found: Found,
    verdicts: Sequence[str],
    remarks: Sequence[str],
    findings: Sequence[Finding],
    *,
    now: int,
    top: int,
) -> str:
    """The file.

    Args:
        now: Unix nanoseconds, when it was made.
        top: most lines of the table.
    """
    report = found.report
    made = datetime.fromtimestamp(now // NANO, UTC).strftime("%Y-%m-%d %H:%M UTC")
    by = ", ".join(heads(report.by)) or "everything"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>Costs by {escape(by)}</title><style>{_CSS}</style></head><body><main>",
        f"<h1>What requests cost, by {escape(by)}</h1>",
        f'<p class="dim">{span(found.days)} of the ledger; made {made} by penstock costs</p>',
        *_cards(report.total),
        *(_verdict(each) for each in verdicts),
        *_charts(report),
        *_table(shortened(report, top)),
        *_pools(report),
        *_findings(findings),
        *_remarks(remarks),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _cards(total: Line) -> Iterator[str]:
    figures = records.figures(total)
    names = {
        "cost_dollars": "cost, idle included",
        "dollars": "charged to requests",
        "idle_share": "of it idle",
        "comparator_dollars": "the cloud takes",
        "dollars_per_success": "a success",
        "requests": "requests",
    }
    yield '<div class="cards">'
    for name, head in names.items():
        if figures[name] is not None:
            value = escape(shown(name, figures[name]))
            yield f'<div class="card"><b>{value}</b><span class="dim">{head}</span></div>'
    yield "</div>"


def _verdict(text: str) -> str:
    bad = " bad" if "loses" in text or "cannot pay" in text else ""
    return f'<p class="verdict{bad}">{escape(text)}</p>'


def _label(report: Report, line: Line) -> str:
    group = records.group(report.by, line.group)
    text = " · ".join(NONE if group[name] in (None, "") else str(group[name]) for name in heads(report.by))
    text = plain(text) or "all"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _bar(report: Report, line: Line) -> Bar:
    cloud = line.comparator
    title = f"{_label(report, line)}: charged {money(line.sums['dollars'])}, idle {money(line.idle)}"
    if line.sums["lost_dollars"]:
        title += f", lost at clouds {money(line.sums['lost_dollars'])}"
    if cloud is not None and line.own["compared"] >= 0.95 * line.sums["requests"]:  # else it is of a part
        title += f"; the cloud takes {money(cloud)}"
    else:
        cloud = None
    parts = ((line.sums["dollars"] + line.sums["lost_dollars"]) / NANO, max(0, line.idle) / NANO)
    return Bar(_label(report, line), parts, title, None if cloud is None else cloud / NANO)


def _charts(report: Report) -> Iterator[str]:
    if not report.lines:
        yield "<h2>Nothing</h2><p>No request of the ledger fits.</p>"
        return
    legend = (
        '<p class="key"><span><i style="background:var(--charged)"></i>charged, or lost at clouds</span>'
        '<span><i style="background:var(--idle)"></i>share of idle</span>{}</p>'
    )
    if "day" in report.by:
        place = report.by.index("day")
        days: dict[int, list[int]] = {}
        for line in report.lines:
            sums = days.setdefault(line.group[place], [0, 0])
            sums[0] += line.sums["dollars"] + line.sums["lost_dollars"]
            sums[1] += line.idle
        bars = [
            Bar(
                records.day(when),
                (charged / NANO, max(0, idle) / NANO),
                f"{records.day(when)}: charged {money(charged)}, idle {money(idle)}",
            )
            for when, (charged, idle) in sorted(days.items())
        ]
        yield "<h2>By day</h2>"
        yield legend.format("")
        yield charts.columns(bars, ("charged", "idle"), "Cost of each day, charged and idle")
    if report.by != ("day",):
        some = shortened(without_days(report), _BARS)
        bars = [_bar(some, line) for line in sorted(some.lines, key=lambda line: -line.cost)]
        yield "<h2>Where the money goes</h2>"
        cloud = '<span><i style="background:var(--cloud)"></i>what the cloud takes for the same</span>'
        yield legend.format(cloud if any(bar.mark is not None for bar in bars) else "")
        yield charts.rows(bars, ("charged", "idle"), "Cost of each group, charged and idle")


def _table(report: Report) -> Iterator[str]:
    if not report.lines:
        return
    totals = records.figures(report.total)
    columns = {name: head for name, head in _COLUMNS.items() if totals[name] not in (None, 0)}
    names = heads(report.by)
    yield '<h2>All of it</h2><div class="scroll"><table class="cardy"><thead><tr>'
    yield "".join(f'<th class="name" scope="col">{escape(name)}</th>' for name in names)
    yield "".join(f'<th scope="col">{escape(head)}</th>' for head in columns.values())
    yield "</tr></thead><tbody>"
    for line in report.lines:
        yield from _row(records.group(report.by, line.group), records.figures(line), names, columns)
    if len(report.lines) > 1:
        group = dict.fromkeys(names, "") | ({names[0]: "total"} if names else {})
        yield from _row(group, totals, names, columns, "total")
    yield "</tbody></table></div>"


def _row(
    group: dict[str, Any],
    figures: dict[str, Any],
    names: Sequence[str],
    columns: dict[str, str],
    kind: str = "",
) -> Iterator[str]:
    yield f'<tr class="{kind}">'
    for name in names:
        value = group[name]
        text = NONE if value in (None, "") and kind != "total" else str(value)
        text = plain(text)
        hidden = " none" if kind == "total" and not text else ""
        yield f'<td class="name{hidden}" data-head="{escape(name)}">{escape(text)}</td>'
    for name, head in columns.items():
        text = shown(name, figures[name])
        none = ' class="none"' if text == "-" else ""
        yield f'<td{none} data-head="{escape(head)}">{escape(text)}</td>'
    yield "</tr>"


def _pools(report: Report) -> Iterator[str]:
    known = [use for use in report.pools if use.paid]
    if not known:
        return
    even = report.total.break_even
    bars = []
    for use in known:
        assert use.paid is not None  # as `known` says
        used = use.charged / use.paid
        title = f"{use.pool}: paid {money(use.paid)}, used {percent(used)} of it, idle {money(use.idle or 0)}"
        bars.append(Bar(title, (used,), title, None if even is None or even > 1 else float(even)))
    yield "<h2>What was paid for, and used</h2>"
    if even is not None and even <= 1:
        yield (
            '<p class="key"><span><i style="background:var(--charged)"></i>used</span><span>'
            f'<i style="background:var(--cloud)"></i>break-even of all: {percent(even)}</span></p>'
        )
    yield charts.rows(bars, ("charged",), "Share of each pool's paid time that was used", most=1.0)


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        return
    yield "<h2>Found</h2>"
    for each in findings:
        amount = "" if each.dollars is None else f"<span>{money(each.dollars)}</span>"
        yield f'<div class="finding"><h3>{escape(_KINDS[each.kind])}{amount}</h3>'
        yield f"<p>{escape(each.text)}</p></div>"


def _remarks(remarks: Sequence[str]) -> Iterator[str]:
    yield "<h2>To know</h2>"
    for each in remarks:
        yield f"<p>{escape(each)}</p>"
    yield (
        '<p class="dim">Cost is what requests were charged, and the share of what was paid for and not used '
        "that their device time is of all device time. Each dollar is in one line.</p>"
    )
