"""A plan for a terminal: the record (record.py) as aligned text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from .hardware import gb as gb

Record = Mapping[str, Any]


def render(record: Record) -> str:
    """All of it."""
    lines: list[str] = []
    for model in record["models"]:
        lines += [*_model(model), ""]
    lines += [*_options(record["options"]), ""]
    if len(record["models"]) > 1 and record["dollars_per_hour"]:
        lines += [f"All models together: {money(record['dollars_per_hour'])} an hour", ""]
    lines.append(_roofline(record["roofline"]))
    return "\n".join(lines)


def _roofline(roof: Record) -> str:
    """Where speeds come from, and how far they may be off."""
    bar, count = roof["error_bar"], roof["measurements"]
    where = (
        f"{count} measurements of yours show; each predicted from the others, they lie between "
        f"{bar['low']:.2f} and {bar['high']:.2f} of it"
        if roof["measured"] == "here"
        else f"{count} published measurements show; of ten of them, eight lie between {bar['low']:.2f} and "
        f"{bar['high']:.2f} of it (docs/planning.md)"
    )
    return (
        f"Speeds are a roofline's, at {roof['memory_efficiency']:.0%} of the bandwidth and "
        f"{roof['compute_efficiency']:.0%} of the FLOP/s, which is what {where}. GB are 10^9 bytes, GiB 2^30."
    )


def _model(model: Record) -> Iterator[str]:
    facts, load, devices = model["model"], model["workload"], model["devices"]
    experts = ""
    if facts["experts"] > 1:
        experts = f", {count(facts['active_parameters'])} of them for a token"
    yield f"{model['name']} ({facts['architecture']}, {count(facts['parameters'])} parameters{experts})"
    targets = ", ".join(f"{name} {ms(value)}" for name, value in load["targets"].items()) or "no targets"
    yield (
        f"  for {load['requests_per_second']:g} requests/s (peak {load['peak_requests_per_second']:g}) of "
        f"{load['prompt_tokens']:,} + {load['output_tokens']:,} tokens, {targets}"
    )
    yield ""
    many = "replica" if devices["replicas"] == 1 else "replicas"
    scheme = "" if devices["quantization"] == "none" else f" in {devices['quantization']}"
    burst = devices["spot_burst_replicas"]
    each = devices["tensor_parallel"] * devices["pipeline_parallel"]
    tp = f" of {each}" if each > 1 else ""
    rows = [
        (
            "use",
            f"{devices['count']} x {devices['kind']}{scheme}: {devices['replicas']} {many}{tp} on demand"
            + (f", and {burst} more on {devices['burst_pool'] or 'spot'} at the peak" if burst else "")
            + f", with {model['engine']['advice']}",
        )
    ]
    rows += [("", f"because: {reason}") for reason in model["engine"]["reasons"][:1]]
    rows.append(("replicas", f"{devices['replicas']}, {_driven(devices)}"))
    memory = model["memory_per_device"]
    rows += [
        ("memory", f"of each device, {gb(memory['total'])} ({gib(memory['total'])})"),
        ("  weights", f"{gb(memory['weights']):>10}"),
        ("  a step", f"{gb(memory['activations_at_most']):>10}  at most{_usual(memory)}"),
        ("  runtime", f"{gb(memory['runtime_assumed']):>10}  assumed"),
    ]
    if facts["kv_bytes_per_token"]:
        rows.append(
            (
                "  KV cache",
                f"{gb(memory['kv_cache']):>10}  {model['capacity']['kv_tokens']:,} tokens of "
                f"{memory['kv_bytes_per_token'] / 1024:,.0f} KiB: {model['capacity']['sequences']:,} such "
                f"requests, {model['capacity']['sequences_at_max_model_len']:,} of the longest",
            )
        )
    rows.append(("flags", " ".join(f"{name} {value}" for name, value in model["flags"].items())))
    expected = model["expected"]
    if expected["ttft_p50"]:
        rows.append(
            (
                "expect",
                f"TTFT {span(expected['ttft_p50'])} median, {span(expected['ttft_p99'])} P99",
            )
        )
    if expected["tpot"] and expected["tpot"]["expected"]:
        rows.append(("", f"TPOT {span(expected['tpot'])}; a whole answer {span(expected['e2e_p50'])} median"))
    most = expected["most_requests_per_second"]
    rows.append(
        (
            "",
            f"up to {most['expected']:.3g} requests/s ({most['low']:.3g} to {most['high']:.3g}); now used to "
            f"{expected['utilisation']:.0%}",
        )
    )
    costs = model["costs"]
    if costs:
        rows.append(
            (
                "costs",
                f"{money(costs['dollars_per_hour'])} an hour{burst_cost(model)}, "
                f"{money(costs['dollars_per_month'])} a month, "
                f"{money(costs['dollars_per_million_tokens'])} for a million tokens, "
                f"{money(costs['dollars_per_thousand_requests'])} for a thousand requests "
                f"({money(costs['dollars_per_thousand_requests_when_full'])} when full)",
            )
        )
    even = model["against_cloud"]
    if even:
        at = even["break_even_utilisation"]
        verdict = (
            f"cheaper from {at:.0%} of its capacity on ({even['break_even_requests_per_second']:.3g} "
            "requests/s)"
            if at <= 1
            else f"never cheaper on this hardware: even when full it costs {at:.2g} times as much"
        )
        rows.append(
            (
                "cloud",
                f"{even['cloud']} takes {money(even['cloud_dollars_per_thousand_requests'])} for a thousand "
                f"requests; self-hosted is {verdict}; at this load it saves {even['saving']:.0%}",
            )
        )
    for name, text in rows:
        yield f"  {name:<12}{text}".rstrip()
    yield ""
    yield from _alternatives(model)
    yield from _mig(model)
    for warning in model["engine"]["warnings"]:
        yield f"  ! {warning}"
    for note in model["notes"]:
        yield f"  - {note}"


def _driven(devices: Record) -> str:
    """`driven by ttft-p99, with which one carries 8.24 requests/s`."""
    bound, carries = (
        devices["replica_bound_by"],
        f"{devices['requests_per_second_of_a_replica']:.3g} requests/s",
    )
    within = "at 85 % of what it can" if bound == "capacity" else f"within {bound.replace('_', '-')}"
    said = {"spec": "as the spec says", "least": "which carries it", "capacity": "driven by the load alone"}
    reason = (
        said.get(devices["replicas_driven_by"])
        or f"driven by {devices['replicas_driven_by'].replace('_', '-')}"
    )
    return f"{reason}: one carries {carries} {within}"


def _usual(memory: Record) -> str:
    usual, peak = memory["activations_as_a_rule"], memory["peak_as_a_rule"]
    return "" if usual is None else f", {usual / 1e6:,.0f} MB as a rule: {gb(peak)} with weights and cache"


def burst_cost(model: Record) -> str:
    """`, $3.00 more at the peak on spot`; nothing where nothing is started then, or it has no price."""
    amount = model["costs"]["dollars_per_hour_of_burst"]
    if not model["devices"]["spot_burst_replicas"] or amount is None:
        return ""
    pool = model["devices"]["burst_pool"]
    return f" ({money(amount)} more at the peak{f' on {pool}' if pool else ''})"


def _alternatives(model: Record) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [
        ("", "device", "TP", "weights", "KV tokens", "requests", "replicas", "an hour", "")
    ]
    for each in _shortlist(model["alternatives"]):
        rows.append(("->" if is_chosen(each, model) else "", *alternative(each)))
    yield from _aligned(rows)
    yield ""


def alternative(each: Record) -> tuple[str, ...]:
    """Cells of a way that was considered: device, ranks, weights, KV tokens, requests, replicas, dollars of
    an hour, and why it does not do."""
    able = each["problem"] is None
    return (
        each["device"],
        str(each["tensor_parallel"]),
        gb(each["weights_per_device"]),
        f"{each['kv_tokens']:,}" if able else "",
        f"{each['sequences']:,}" if able else "",
        str(each["replicas"]) if able else "",
        money(each["dollars_per_hour"]) if able and each["dollars_per_hour"] else "",
        each["problem"] or "",
    )


def is_chosen(each: Record, model: Record) -> bool:
    """Whether it is the way that the plan takes."""
    chosen, names = model["devices"], ("tensor_parallel", "quantization")
    return (each["device"], *(each[name] for name in names)) == (
        chosen["kind"],
        *(chosen[name] for name in names),
    )


def _shortlist(found: Sequence[Record]) -> Sequence[Record]:
    """All of them; of several devices, each one's cheapest that does, or its largest that does not."""
    devices = dict.fromkeys(each["device"] for each in found)
    if len(devices) == 1:
        return found
    short = []
    for device in devices:
        its = [each for each in found if each["device"] == device]
        able = [each for each in its if each["problem"] is None]
        short.append(
            min(able, key=lambda each: (Decimal(each["dollars_per_hour"] or 0), each["devices"]))
            if able
            else its[-1]
        )
    return short


def _mig(model: Record) -> Iterator[str]:
    if not model["mig"]:
        return
    rows = [("", "MIG slice", "memory", "weights", "KV tokens", "")]
    for each in model["mig"]:
        rows.append(
            (
                "",
                each["profile"],
                gb(each["memory"]),
                gb(each["weights"]),
                f"{each['kv_tokens']:,}" if each["problem"] is None else "",
                each["problem"] or "",
            )
        )
    yield from _aligned(rows)
    yield ""


def _options(options: Record) -> Iterator[str]:
    rows = [("option", "", "devices", "an hour", "throughput", "isolation", "production", "scale apart")]
    for each in options["options"]:
        possible = each["devices"] > 0
        rows.append(
            (
                f"{each['option']} {each['title']}",
                "<-" if each["option"] == options["recommended"] else "",
                f"{each['devices']} x {each['device']}" if possible else "-",
                money(each["dollars_per_hour"]) if each["dollars_per_hour"] else "-",
                each["throughput"],
                each["isolation"],
                "yes" if each["production"] else "no",
                "yes" if each["independent_scaling"] else "no",
            )
        )
    yield from _aligned(rows)
    for each in options["options"]:
        if each["why_not"]:
            yield f"  {each['option']}: {each['why_not']}"
        for number, device in enumerate(each["layout"], 1):
            yield f"  {each['option']}: device {number}: {' + '.join(device)}"
    yield f"  Recommended: {options['recommended']}. {options['reason']}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; the last one is free."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        yield ("  " + "  ".join([*cells, row[-1]])).rstrip()


def gib(size: float) -> str:
    """Binary."""
    return f"{size / 2**30:,.1f} GiB"


def count(number: int) -> str:
    """6738415616 → 6.74B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def ms(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def span(estimate: Mapping[str, float]) -> str:
    """`120 ms (90 ms to 170 ms)`."""
    return f"{ms(estimate['expected'])} ({ms(estimate['low'])} to {ms(estimate['high'])})"


def money(amount: str | None) -> str:
    """At least two decimals; three digits below a cent."""
    if amount is None:
        return "-"
    value = Decimal(amount)
    if value >= 1000:
        return f"${value:,.0f}"
    return f"${value:,.2f}" if value >= Decimal("0.1") or not value else f"${value:.3g}"
