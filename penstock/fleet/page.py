"""A plan as one page of HTML: no scripts, no fonts, nothing from anywhere; light and dark; wide and
narrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from html import escape
from importlib import resources
from typing import Any

from . import svg
from .table import alternative, burst_cost, count, gb, gib, is_chosen, money, ms

Record = Mapping[str, Any]

_PARTS = (
    ("weights", "weights", "weights"),
    ("step", "activations_at_most", "a step, at most"),
    ("runtime", "runtime_assumed", "CUDA and buffers, assumed"),
    ("kv", "kv_cache", "KV cache"),
)


def page(record: Record) -> str:
    """The whole document."""
    body = "\n".join(_body(record))
    style = resources.files("penstock.fleet").joinpath("page.css").read_text(encoding="utf-8")
    names = ", ".join(model["name"] for model in record["models"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'\">\n"
        f"<title>Plan: {escape(names)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def _body(record: Record) -> Iterator[str]:
    bar = record["roofline"]
    whose, which = "published", "of ten of them, eight"
    if bar["measured"] == "here":
        whose, which = "of your own", "predicted from one another, they"
    yield f"<h1>Plan for {escape(', '.join(model['name'] for model in record['models']))}</h1>"
    yield (
        f'<p class="soft">Speeds are a roofline\'s, fitted to {bar["measurements"]} {whose} measurements; '
        f"{which} lie between {bar['error_bar']['low']:.2f} and {bar['error_bar']['high']:.2f} of it. GB are "
        "10<sup>9</sup> bytes, GiB 2<sup>30</sup>.</p>"
    )
    if len(record["models"]) > 1 and record["dollars_per_hour"]:
        yield f"<p>All models together: <b>{money(record['dollars_per_hour'])}</b> an hour.</p>"
    yield "<h2>Memory</h2>" + _memory(record["models"])
    for model in record["models"]:
        yield from _model(model)
    yield from _options(record["options"])


def _memory(models: Sequence[Record]) -> str:
    rows = []
    for model in models:
        memory, devices = model["memory_per_device"], model["devices"]
        label = f"{model['name']}: each {devices['kind']}, {gb(memory['total'])}"
        parts = [(kind, float(memory[key]), what) for kind, key, what in _PARTS]
        rows.append((label, parts, float(memory["total"])))
    legend = "".join(
        f'<li><i style="background: var(--{kind})"></i>{escape(what)}</li>' for kind, _, what in _PARTS
    )
    legend += '<li><i style="background: var(--rest)"></i>left to others</li>'
    return f'<div class="chart"><ul class="legend">{legend}</ul>{svg.bars(rows)}</div>'


def _model(model: Record) -> Iterator[str]:
    facts, load, devices, expected = model["model"], model["workload"], model["devices"], model["expected"]
    yield f"<h2>{escape(model['name'])}</h2>"
    experts = f", {count(facts['active_parameters'])} of them for a token" if facts["experts"] > 1 else ""
    targets = ", ".join(f"{name} {ms(value)}" for name, value in load["targets"].items()) or "no targets"
    yield (
        f'<p class="soft">{escape(facts["id"])}, {escape(facts["architecture"])}, '
        f"{count(facts['parameters'])} parameters{experts}. For {load['requests_per_second']:g} requests/s "
        f"(peak {load['peak_requests_per_second']:g}) of {load['prompt_tokens']:,} + "
        f"{load['output_tokens']:,} tokens, {targets}.</p>"
    )
    many = f"{devices['replicas']} on demand"
    if devices["spot_burst_replicas"]:
        many += f", {devices['spot_burst_replicas']} more on {devices['burst_pool'] or 'spot'}"
    costs = model["costs"]
    tiles = [
        (f"{devices['count']} x {devices['kind']}", f"replicas: {many}"),
        (model["engine"]["advice"], "engine"),
        (f"{model['capacity']['sequences']:,}", "such requests at a time on each replica"),
        (span_short(expected["ttft_p99"]), "TTFT, 99 of 100"),
    ]
    if expected["tpot"] and expected["tpot"]["expected"]:
        tiles.append((span_short(expected["tpot"]), "for each token"))
    if costs:
        tiles += [
            (money(costs["dollars_per_hour"]), f"an hour{burst_cost(model)}"),
            (money(costs["dollars_per_million_tokens"]), "a million tokens"),
            (money(costs["dollars_per_thousand_requests"]), "a thousand requests"),
        ]
    yield (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
            for value, what in tiles
        )
        + "</div>"
    )
    yield (
        "<h3>Flags</h3><pre>"
        + escape(" ".join(f"{name} {value}" for name, value in model["flags"].items()))
        + "</pre>"
    )
    yield from _latency(expected)
    if costs:
        yield "<h3>Cost against utilisation</h3>" + _cost_chart(model)
    points = [(_tokens(int(name)), float(value)) for name, value in model["capacity"]["by_context"].items()]
    if points:
        yield "<h3>Requests at a time against their length</h3>" + (
            '<div class="chart">'
            + svg.columns(
                points,
                title="Requests that one replica's cache holds, by length",
                y_label="requests that one replica's cache holds (logarithmic)",
                x_label="tokens of each",
            )
            + "</div>"
        )
    yield from _alternatives(model)
    yield from _mig(model)
    remarks = [*model["engine"]["reasons"], *model["engine"]["warnings"], *model["notes"]]
    yield "<h3>Notes</h3><ul>" + "".join(f"<li>{escape(text)}</li>" for text in remarks) + "</ul>"


def _latency(expected: Record) -> Iterator[str]:
    rows = [("", "expected", "from", "to")]
    for name, what in (
        ("ttft_p50", "TTFT, median"),
        ("ttft_p95", "TTFT, P95"),
        ("ttft_p99", "TTFT, P99"),
        ("tpot", "time for each token"),
        ("e2e_p50", "whole answer, median"),
        ("e2e_p99", "whole answer, P99"),
    ):
        value = expected[name]
        if value and value["expected"]:
            rows.append((what, ms(value["expected"]), ms(value["low"]), ms(value["high"])))
    most = expected["most_requests_per_second"]
    rows.append(
        ("requests/s at most", f"{most['expected']:.3g}", f"{most['low']:.3g}", f"{most['high']:.3g}")
    )
    yield "<h3>Expected, with error bar</h3>" + _table(rows)


def _cost_chart(model: Record) -> str:
    """Dollars of a thousand requests over the share of the capacity that is used."""
    full = float(Decimal(model["costs"]["dollars_per_thousand_requests_when_full"]))
    even = model["against_cloud"]
    points = [(share / 100, full / (share / 100)) for share in range(5, 101)]
    series: list[tuple[str, str, Sequence[tuple[float, float]]]] = []
    mark = None
    top = full * 6
    if even:
        cloud = float(Decimal(even["cloud_dollars_per_thousand_requests"]))
        top = max(top, 1.6 * cloud)
        series.append(("cloud", str(even["cloud"]), [(0.05, cloud), (1.0, cloud)]))
        at = even["break_even_utilisation"]
        if 0.05 <= at <= 1:
            mark = (at, cloud, f"cheaper from {at:.0%} on")
    shown = [(x, y) for x, y in points if y <= top]
    series.insert(0, ("ours", "self-hosted", shown))
    if not even:
        used = model["expected"]["utilisation"] or 0.0
        now = float(Decimal(model["costs"]["dollars_per_thousand_requests"]))
        if now <= top:
            mark = (max(shown[0][0], full / now), now, f"now: {used:.0%} of all that it can do")
    chart = svg.lines(
        series,
        title="Dollars of a thousand requests, against utilisation",
        x_label="share of the usable capacity that is used",
        y_label="US dollars for a thousand requests",
        x_ticks=[(share / 100, f"{share}%") for share in (20, 40, 60, 80, 100)],
        mark=mark,
    )
    return f'<div class="chart">{chart}</div>'


def _alternatives(model: Record) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [
        ("device", "ranks", "weights", "KV tokens", "requests", "replicas", "an hour", "")
    ]
    marks: list[str] = []
    for each in model["alternatives"]:
        rows.append(alternative(each))
        marks.append("chosen" if is_chosen(each, model) else "")
    yield "<h3>What was considered</h3>" + _table(rows, marks)


def _mig(model: Record) -> Iterator[str]:
    if not model["mig"]:
        return
    rows: list[tuple[str, ...]] = [("slice", "memory", "weights", "KV cache", "KV tokens", "")]
    for each in model["mig"]:
        able = each["problem"] is None
        rows.append(
            (
                each["profile"],
                f"{gb(each['memory'])} ({gib(each['memory'])})",
                gb(each["weights"]),
                gb(each["kv_cache"]) if able else "",
                f"{each['kv_tokens']:,}" if able else "",
                each["problem"] or "",
            )
        )
    yield "<h3>In MIG slices</h3>" + _table(rows)


def _options(options: Record) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [
        ("option", "devices", "an hour", "throughput", "isolation", "production", "scale apart")
    ]
    marks = []
    for each in options["options"]:
        possible = each["devices"] > 0
        rows.append(
            (
                f"{each['option']}: {each['title']}",
                f"{each['devices']} x {each['device']}" if possible else "-",
                money(each["dollars_per_hour"]) if each["dollars_per_hour"] else "-",
                each["throughput"],
                each["isolation"],
                "yes" if each["production"] else "no",
                "yes" if each["independent_scaling"] else "no",
            )
        )
        marks.append("chosen" if each["option"] == options["recommended"] else "")
    yield "<h2>Whole devices, slices, or turns</h2>" + _table(rows, marks)
    yield f"<p><b>Recommended: {escape(options['recommended'])}.</b> {escape(options['reason'])}</p>"
    remarks = [f"{each['option']}: {each['why_not']}" for each in options["options"] if each["why_not"]]
    remarks += [
        f"{each['option']}, device {number}: {' + '.join(device)}"
        for each in options["options"]
        for number, device in enumerate(each["layout"], 1)
    ]
    if remarks:
        yield "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in remarks) + "</ul>"


def _table(rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """A head and rows; what looks like a number stands to the right."""
    numeric = [
        all(not row[column] or row[column][0] in "0123456789$-" for row in rows[1:]) and len(rows) > 1
        for column in range(len(rows[0]))
    ]

    def cell(tag: str, text: str, column: int) -> str:
        kind = " class=n" if numeric[column] and column else " class=why" if len(text) > 40 else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, column) for column, text in enumerate(rows[0]))
    body = ""
    for index, row in enumerate(rows[1:]):
        mark = marks[index] if index < len(marks) else ""
        cells = "".join(cell("td", text, column) for column, text in enumerate(row))
        body += f"<tr{f' class={mark}' if mark else ''}>{cells}</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def span_short(estimate: Mapping[str, float] | None) -> str:
    """The value alone; its bar stands in the table."""
    return "-" if estimate is None else ms(estimate["expected"])


def _tokens(number: int) -> str:
    return f"{number // 1024}K"
