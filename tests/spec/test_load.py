"""What is wrong with a spec is told with its line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from penstock.spec import SpecError, load, loads

GOOD = """\
pools:
  here: {hardware: cpu}
  gpus: {hardware: L4, count: 2}
models:
  demo: {weights: demo, pool: here}
upstreams:
  cloud:
    url: https://api.example.com/v1
    models:
      large: {price: {input: 1, output: 2, as_of: 2026-01-01, source: a list}}
      plain: {}
routes:
  assistant:
    targets: [{model: demo}]
"""


def told(text: str) -> list[str]:
    """The lines of the error of a text."""
    with pytest.raises(SpecError) as caught:
        loads(text)
    lines = caught.value.message.splitlines()
    assert all(re.match(r"penstock\.yaml:\d+: ", line) for line in lines), lines
    return lines


def error(text: str) -> str:
    """The one error of a text, with its line."""
    (line,) = told(text)
    return line.removeprefix("penstock.yaml:")


def test_a_good_one() -> None:
    spec = loads(GOOD)
    assert spec.models["demo"].pool == "here"
    assert spec.upstreams["cloud"].replicas == ("https://api.example.com",)
    price = spec.upstreams["cloud"].models["large"].price
    assert price is not None
    assert price.output == 2_000_000_000


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("hardware: cpu", "hardwear: cpu", "2: pools.here.hardwear: unknown key. Did you mean hardware?"),
        ("hardware: cpu", "zzz: 1", "2: pools.here.zzz: unknown key."),
        ("pool: here}", "pool: her}", "5: models.demo.pool: there is no pool her. Did you mean here?"),
        (
            "pool: here}",
            "pool: gpus, replicas: 3}",
            "3: pools.gpus.count: 2 devices, but the models on it take 3",
        ),
        ("weights: demo, ", "", "5: models.demo.weights: is required."),
        ("{model: demo}]", "{model: dem}]", "14: routes.assistant.targets.0.model: there is no model dem."),
        (
            "input: 1,",
            "input: -1,",
            "10: upstreams.cloud.models.large.price.input: input should be greater than",
        ),
        ("input: 1,", "input: 0.0000000001,", "of at most nine decimals"),
        ("input: 1,", "input: 1e999999999,", "is no amount of less than nine billion US dollars"),
        ("input: 1,", "input: .nan,", "is no amount of"),
        (
            "as_of: 2026-01-01",
            "as_of: 2026-13-01",
            "10: cannot be read as YAML: '2026-13-01' cannot be read: month",
        ),
        ("as_of: 2026-01-01, ", "", "10: upstreams.cloud.models.large.price.as_of: is required."),
        ("input: 1,", "input: 1, batch: 2,", "price.batch: input should be less than or equal to 1, got 2"),
        ("input: 1,", "input: 1, batch: 0,", "price.batch: input should be greater than 0, got 0"),
        (
            "  cloud:",
            "  cloud:\n    files: true\n    kind: vllm",
            "8: upstreams.cloud.files: needs kind: openai or penstock; vllm has no /v1/files.",
        ),
        ("https://api", "file:///etc", "8: upstreams.cloud.url: string should match pattern"),
        ("https://api", "https://user:pass@api", "8: upstreams.cloud.url: string should match pattern"),
        ("count: 2", "count: 0", "3: pools.gpus.count: input should be greater than or equal to 1, got 0."),
        ("  assistant:", "  assistant: &a", ""),
        ("[{model: demo}]", "*a", "14: cannot be read as YAML: aliases (*name) are not supported."),
        ("weights: demo", 'weights: "a\\0b"', "5: models.demo.weights: has the control character U+0000."),
        ("weights: demo", "weights: --help", "5: models.demo.weights: string should match pattern"),
        (
            "plain: {}",
            '"a\\e[2J": {}',
            "11: upstreams.cloud.models.a\\x1b[2J: has the control character U+001B.",
        ),
        (
            "  cloud:",
            '  cloud:\n    headers: {x-a: "b\\nc"}',
            "8: upstreams.cloud.headers.x-a: string should",
        ),
        (
            "  cloud:",
            "  cloud:\n    headers: {Authorization: Bearer x}",
            "a key does not belong into the file",
        ),
        (
            "routes:",
            "gateway: {trusted_proxies: [10.0.0.0/8, nobody]}\nroutes:",
            "12: gateway.trusted_proxies.1: 'nobody' is no",
        ),
        (
            "routes:",
            "ledger: {url: 'postgresql://me:secret@db/x'}\nroutes:",
            "12: ledger.url: a password does not belong",
        ),
        (
            "routes:",
            "ledger: {url: 'mysql://db/x'}\nroutes:",
            "12: ledger.url: is no URL of sqlite or postgresql.",
        ),
        (
            "routes:",
            "ledger: {counters: localhost}\nroutes:",
            "12: ledger.counters: is no URL of redis or rediss.",
        ),
        (
            "[{model: demo}]",
            "[{model: demo}]\n    match: [{}]",
            "15: routes.assistant.match.0: names neither headers",
        ),
        ("routes:", "pools:", "1: pools: stands twice, again in line 12."),
        (
            "[{model: demo}]",
            "[{model: demo]",
            "14: cannot be read as YAML: expected ',' or '}', but got ']'.",
        ),
        ("cpu}", "cpu\x07}", "2: cannot be read as YAML: there is the character U+0007."),
        (
            "pool: here}",
            "pool: here, flags: {port: 1}}",
            "5: models.demo.flags.port: is decided by whoever starts",
        ),
        (
            "pool: here}",
            "pool: here, flags: {max_model_len: 1}}",
            "write max_model_len: beside weights: instead.",
        ),
        (
            "pool: here}",
            "pool: here, flags: {--x: 1}}",
            "5: models.demo.flags.--x: string should match pattern",
        ),
        ("pool: here}", "pool: here, keep_alive: 5m}", "5: models.demo.keep_alive: needs start: lazy"),
        (
            "pool: here}",
            "pool: here, memory: 3 cakes}",
            "'3 cakes' is no size; write 4096, 512MiB, 80GB or 40GiB",
        ),
        ("pool: here}", f"pool: here, memory: {'9' * 5000}}}", "5: cannot be read as YAML: "),
    ],
)
def test_what_is_wrong_is_told_with_its_line(before: str, after: str, expected: str) -> None:
    text = GOOD.replace(before, after, 1)
    if not expected:
        assert loads(text) == loads(GOOD)
    else:
        assert expected in error(text)


def test_priorities_are_vllms() -> None:
    line = error(GOOD.replace("    models:\n      large", "    priorities: true\n    models:\n      large"))
    assert line == "9: upstreams.cloud.priorities: needs kind: vllm; openai schedules in another way."


def test_all_errors_are_told_at_once_in_order() -> None:
    lines = told(
        GOOD.replace("count: 2", "cuont: 2").replace("weights: demo, ", "").replace("plain: {}", "plain: 1")
    )
    assert [line.split(":")[1] for line in lines] == ["3", "5", "11"]


def test_names_that_lead_nowhere_are_told_beside_shapes_that_are_wrong() -> None:
    text = GOOD.replace("pool: here", "pool: her") + "    retires: 2\n"
    assert told(text + "teams: {t: {routes: [asistant]}}\n") == [
        "penstock.yaml:5: models.demo.pool: there is no pool her. Did you mean here?",
        "penstock.yaml:15: routes.assistant.retires: unknown key. Did you mean retries?",
        "penstock.yaml:16: teams.t.routes.0: there is no route asistant. Did you mean assistant?",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("here: {hardware: cpu}", "here: {hardware: 7}"),
        ("gpus: {hardware: L4, count: 2}", "gpus: {count: many}"),
        ("weights: demo, pool: here", "weights: demo"),
        ("models:\n      large", "modells: {}\n    models:\n      large"),
        ("targets: [{model: demo}]", "targets: []"),
    ],
)
def test_of_a_part_that_is_wrong_nothing_else_is_said(before: str, after: str) -> None:
    """Its name is known to others, and what it says may be as wrong as the rest of it."""
    more = "  other: {targets: [{model: large, upstream: cloud}, {model: demo}]}\n"
    (line,) = told((GOOD + more).replace(before, after))
    assert "there is no" not in line


@pytest.mark.parametrize("wrong", ["models: 7", "gateway: {port: x}", "polls: {}", "version: 2", "1: 2"])
def test_what_is_wrong_above_all_names(wrong: str) -> None:
    text = GOOD.replace("{model: demo}", "{model: dem}")
    if wrong.startswith("models"):
        text = text.replace("models:\n  demo: {weights: demo, pool: here}", wrong)
        assert all("models" in line for line in told(text))
    else:
        assert any("there is no model dem. Did you mean demo?" in line for line in told(f"{text}{wrong}\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: is empty."),
        ("# nothing\n", "1: is empty."),
        ("~", "1: is empty."),
        ("- 1", "1: input should be a valid dictionary"),
        ("[" * 1000, "1: cannot be read as YAML: it is nested more than 32 deep."),
        ("a:\n  " + "{a: " * 40, "2: cannot be read as YAML: it is nested more than 32 deep."),
        ("pools: {? [a, b] : c}", "1: cannot be read as YAML: found unhashable key."),
        ("a: 1\n--- \nb: 2", "2: cannot be read as YAML: but found another document."),
        (
            "a: !!python/object/apply:os.system [ls]",
            "1: cannot be read as YAML: could not determine a constructor",
        ),
        ("a: !!int ''", "1: cannot be read as YAML: '' cannot be read"),
        ("pools: {1: {}}", "1: pools.1: input should be a valid string, got 1."),
        ('pools: {"a\\nb": {}}', "1: pools.a\\nb: string should match pattern"),
    ],
)
def test_what_is_no_spec_at_all(text: str, expected: str) -> None:
    assert expected in error(text)


def test_a_thousand_errors_are_not_all_told() -> None:
    with pytest.raises(SpecError) as caught:
        loads("\n".join(f"key{number}: 1" for number in range(1000)))
    lines = caught.value.message.splitlines()
    assert len(lines) == 31
    assert lines[-1] == "penstock.yaml: and 970 more."


def test_values_are_shown_in_a_line_at_most() -> None:
    assert len(error(GOOD.replace("https://api", "x" * 100_000))) < 300
    assert len(error(GOOD.replace("hardware", "x" * 100_000))) < 400


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text(GOOD)
    assert load(file) == loads(GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # some editors write a byte order mark
    assert load(file) == loads(GOOD)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.yaml", "cannot be read: No such file or directory. `penstock init` writes an example."),
        ("folder", "is a directory."),
        ("pipe", "is no regular file."),
        ("large", "is over 262144 bytes."),
        ("latin", "is not UTF-8 at byte 2."),
        ("nu\0ll", "cannot be read: embedded null byte."),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * ((256 << 10) + 1))
    (tmp_path / "latin").write_bytes(b"# \xe9")
    with pytest.raises(SpecError) as caught:
        load(tmp_path / name)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "limit",
    [
        "requests_per_minute: 10000000000000001",
        "tokens_per_minute: 99999999999999999999999999",
        "concurrent_requests: 9223372036854775808",
        "gpu_hours_per_day: 1.0e+300",
        "gpu_hours_per_month: 2600000",
    ],
)
def test_a_limit_that_nothing_can_count_to_is_an_error(limit: str) -> None:
    with pytest.raises(SpecError, match=r"1: limits\.\w+: input should be less than or equal to"):
        loads(f"limits: {{{limit}}}")


ESCALATES = (
    GOOD
    + """\
    escalate:
      to: [{model: large, upstream: cloud}]
      verifiers: [{mean_logprob: -0.5}]
  other:
    targets: [{model: plain, upstream: cloud}]
"""
)
ONE_OF = (
    "a verifier is one of mean_logprob, json_schema, regex, not_regex, length, finish_reason, url, "
    "python, not "
)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "{model: large,",
            "{model: larg,",
            "routes.assistant.escalate.to.0.model: there is no model of cloud larg.",
        ),
        (
            "upstream: cloud}]\n      v",
            "upstream: clod}]\n      v",
            "there is no upstream clod. Did you mean cloud?",
        ),
        (
            "to: [{model: large, upstream: cloud}]",
            "route: othr",
            "escalate.route: there is no route othr. Did you mean",
        ),
        ("to: [{model: large, upstream: cloud}]", "route: assistant", "is the route itself"),
        ("      to: [{model: large, upstream: cloud}]\n", "", "escalate has either to or route"),
        ("      verifiers", "      route: other\n      verifiers", "escalate has either to or route"),
        ("[{mean_logprob: -0.5}]", "[]", "verifiers: tuple should have at least 1 item"),
        (
            "mean_logprob: -0.5",
            "mean_logprob: 0.5",
            "mean_logprob: input should be less than or equal to 0, got 0.5",
        ),
        ("mean_logprob: -0.5", "mean_logprb: -0.5", "unknown key. Did you mean mean_logprob?"),
        ("{mean_logprob: -0.5}", "{name: x}", ONE_OF + "none"),
        ("mean_logprob: -0.5", "mean_logprob: -0.5, regex: x", ONE_OF + "mean_logprob and regex"),
        ("{mean_logprob: -0.5}", "{regex: '('}", "verifiers.0.regex: is no regular expression: missing )"),
        ("{mean_logprob: -0.5}", "{regex: a}, {regex: b}", "regex is also the name of another verifier"),
        ("mean_logprob: -0.5", "json_schema: {type: objct}", "json_schema: is no JSON Schema: type: 'objct'"),
        ("mean_logprob: -0.5", "json_schema: {$ref: 'http://x'}", "leads out of the schema"),
        ("mean_logprob: -0.5", "json_schema: {$ref: '#/$defs/x'}", "leads nowhere"),
        ("mean_logprob: -0.5", "finish_reason: [stopp]", "finish_reason.0: input should be 'stop'"),
        ("mean_logprob: -0.5", "python: nothing", "python: string should match pattern"),
    ],
)
def test_an_escalation_that_cannot_be(before: str, after: str, expected: str) -> None:
    assert before in ESCALATES
    assert any(expected in line for line in told(ESCALATES.replace(before, after))), told(
        ESCALATES.replace(before, after)
    )


def test_an_escalation_to_a_route_that_escalates_or_leaves_the_house() -> None:
    twice = (
        ESCALATES.replace("to: [{model: large, upstream: cloud}]", "route: other")
        + """\
    escalate: {to: [{model: demo}], verifiers: [{regex: x}]}
"""
    )
    assert "other escalates itself; that is done once only." in error(twice)
    inside = ESCALATES.replace("    escalate:", "    local_only: true\n    escalate:")
    assert "escalate.to.0: the route is local_only, and cloud is not in the house." in error(inside)
    other = inside.replace("to: [{model: large, upstream: cloud}]", "route: other")
    assert "escalate.route: the route is local_only, and cloud is not in the house." in error(other)
