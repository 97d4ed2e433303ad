"""`penstock bench`: every flag arrives where it belongs, and its help says what it takes."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.errors import BenchError
from penstock.bench.serve import ServeBench
from penstock.cli import bench
from penstock.cli.bench import _metrics, _percentiles, _result_paths, _serve_bench, _write_json

from .test_bench_cli import run


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penstock")
    commands = parser.add_subparsers(required=True)
    bench.add_arguments(commands.add_parser("bench"))
    return parser.parse_args(["bench", *words])


def served(*words: str) -> ServeBench:
    return _serve_bench(parsed("serve", *words))


def test_without_flags_the_defaults_are_those_of_the_measurement() -> None:
    assert served() == ServeBench(base_url="http://127.0.0.1:8000")
    args = parsed("serve")
    assert (args.save_result, args.no_progress, args.output_json, args.result_dir) == (
        False,
        False,
        None,
        None,
    )
    assert args.percentile_metrics is None


FLAGS: list[tuple[str, str, dict[str, Any]]] = [
    ("--base-url", "http://h:1/v1", {"base_url": "http://h:1"}),
    ("--host", "h", {"base_url": "http://h:8000"}),
    ("--port", "81", {"base_url": "http://127.0.0.1:81"}),
    ("--backend", "vllm", {"endpoint": "/v1/completions"}),
    ("--backend", "openai-chat", {"endpoint": "/v1/chat/completions"}),
    ("--endpoint", "/x/completions", {"endpoint": "/x/completions"}),
    ("--model", "m", {"model": "m"}),
    ("--api-key", "k", {"headers": {"Authorization": "Bearer k"}}),
    ("--header", "A=b=c", {"headers": {"A": "b=c"}}),
    ("--request-timeout", "5", {"request_timeout": 5.0}),
    ("--num-prompts", "1", {"num_prompts": 1}),
    ("--num-warmups", "0", {"num_warmups": 0}),
    ("--num-warmups", "2", {"num_warmups": 2}),
    ("--random-input-len", "3", {"random_input_len": 3}),
    ("--input-len", "3", {"random_input_len": 3}),
    ("--random-output-len", "4", {"output_len": 4}),
    ("--output-len", "4", {"output_len": 4}),
    ("--random-range-ratio", "0.5", {"random_range_ratio": 0.5}),
    ("--random-prefix-len", "6", {"random_prefix_len": 6}),
    ("--prompt-format", "text", {"prompt_format": "text"}),
    ("--prompt-format", "token-ids", {"prompt_format": "token-ids"}),
    ("--vocab-size", "7", {"vocab_size": 7}),
    ("--seed", "8", {"seed": 8}),
    ("--request-rate", "0.5", {"request_rate": 0.5}),
    ("--request-rate", "inf", {"request_rate": math.inf}),
    ("--burstiness", "0.25", {"burstiness": 0.25}),
    ("--max-concurrency", "1", {"max_concurrency": 1}),
    ("--max-duration", "9", {"max_duration": 9.0}),
    ("--temperature", "0", {"body": {"temperature": 0.0}}),
    ("--top-p", "0.5", {"body": {"top_p": 0.5}}),
    ("--top-k", "3", {"body": {"top_k": 3}}),
    ("--min-p", "0.1", {"body": {"min_p": 0.1}}),
    ("--extra-body", '{"a": 1}', {"body": {"a": 1}}),
    ("--metric-percentiles", "0,99.9,100", {"percentiles": (0.0, 99.9, 100.0)}),
    ("--goodput", "ttft:5", {"goodput_ms": {"ttft": 5.0}}),
]


@pytest.mark.parametrize(("flag", "value", "fields"), FLAGS)
def test_each_flag_arrives(flag: str, value: str, fields: dict[str, Any]) -> None:
    found = served(flag, value)
    assert found == ServeBench(**{"base_url": "http://127.0.0.1:8000"} | fields)


def test_a_file_of_prompts_has_a_name_and_a_path() -> None:
    for name in ("jsonl", "custom"):
        assert served("--dataset-name", name, "--dataset-path", "x").dataset_path == Path("x")
    for words in (("--dataset-name", "jsonl"), ("--dataset-path", "x")):
        with pytest.raises(BenchError, match="jsonl needs a file and random takes none"):
            served(*words)


def test_what_is_given_twice_adds_up_or_wins() -> None:
    found = served(
        *("--ignore-eos", "--temperature", "1", "--extra-body", '{"temperature": 2, "ignore_eos": false}'),
        *("--header", "A=1", "B=2", "--header", "C=", "--goodput", "ttft:1", "tpot:2"),
    )
    assert found.body == {"temperature": 2, "ignore_eos": False}
    assert served("--ignore-eos").body == {"ignore_eos": True}
    assert found.headers == {"A": "1", "B": "2", "C": ""}
    assert found.goodput_ms == {"ttft": 1.0, "tpot": 2.0}


def test_keys_of_the_environment_are_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "outer")
    assert served().headers == {"Authorization": "Bearer outer"}
    assert served("--api-key", "inner").headers == {"Authorization": "Bearer inner"}
    assert served("--header", "Authorization=own").headers == {"Authorization": "own"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--header", "=b"), "--header '=b': write KEY=VALUE"),
        (("--header", "b"), "--header 'b': write KEY=VALUE"),
        (("--endpoint", "v1/completions"), "--endpoint is 'v1/completions'; it must be /v1/completions or"),
        (("--endpoint", "/v1/responses"), "it must be /v1/completions or /v1/chat/completions"),
        (("--extra-body", "{"), "--extra-body is not JSON: "),
        (("--extra-body", "5"), "--extra-body is '5'; it must be a JSON object"),
        (("--metric-percentiles", "-1"), "--metric-percentiles is '-1'; write numbers from 0 to 100"),
        (("--metric-percentiles", "100.1"), "write numbers from 0 to 100 like 50,90,99"),
        (("--metric-percentiles", ""), "write numbers from 0 to 100"),
    ],
)
def test_what_makes_no_sense_is_named(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(BenchError) as caught:
        served(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--request-timeout", "0", "0 is not above 0"),
        ("--request-rate", "-1", "-1 is not above 0"),
        ("--burstiness", "nan", "nan is not above 0"),
        ("--max-duration", "0", "0 is not above 0"),
        ("--num-prompts", "0", "0 is not at least 1"),
        ("--max-concurrency", "-2", "-2 is not at least 1"),
        ("--num-warmups", "-1", "-1 is below 0"),
        ("--backend", "tgi", "choose from 'openai', 'openai-chat', 'vllm'"),
        ("--prompt-format", "image", "choose from 'auto', 'text', 'token-ids'"),
        ("--dataset-name", "sharegpt", "choose from 'random', 'jsonl', 'custom'"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_flag(
    flag: str, value: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("serve", flag, value)
    said = capsys.readouterr().err
    assert f"argument {flag}" in said
    assert why in said


HELP = {
    "--base-url": "URL",
    "--endpoint": "PATH",
    "--api-key": "KEY",
    "--header": "KEY=VALUE",
    "--request-timeout": "S",
    "--dataset-path": "FILE",
    "--num-prompts": "N",
    "--num-warmups": "N",
    "--random-input-len": "N",
    "--random-output-len": "N",
    "--random-range-ratio": "R",
    "--random-prefix-len": "N",
    "--vocab-size": "N",
    "--request-rate": "R",
    "--burstiness": "B",
    "--max-concurrency": "N",
    "--max-duration": "S",
    "--temperature": "X",
    "--top-p": "X",
    "--top-k": "X",
    "--min-p": "X",
    "--extra-body": "JSON",
    "--percentile-metrics": "LIST",
    "--metric-percentiles": "LIST",
    "--goodput": "METRIC:MS",
    "--result-dir": "DIR",
    "--result-filename": "NAME",
    "--output-json": "FILE",
}


def test_help_says_what_each_flag_takes_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("serve", "--help")
    text = capsys.readouterr().out
    assert "Put load on any OpenAI-compatible server; report latency, throughput and goodput." in text
    for group in ("server:", "prompts:", "load:", "sampling:", "report:"):
        assert f"\n{group}\n" in text
    for flag, value in HELP.items():
        assert re.search(rf"^  {flag} {value}( |,|$)", text, re.MULTILINE), flag
    for told in (
        "API to use (openai)",
        "(127.0.0.1)",
        "(8000)",
        "give up a request after S s (600)",
        "source (random)",
        "requests (1000)",
        "not counted (0)",
        "tokens (1024)",
        "tokens (128)",
        "lengths vary by ±R, 0 to 1 (0.0)",
        "tokens shared by all prompts (0)",
        "token ids are drawn below N (1000)",
        "of prompts and arrivals (0)",
        "(50,90,99)",
    ):
        assert told in text, told
    with pytest.raises(SystemExit):
        parsed("startup", "--help")
    text = capsys.readouterr().out
    assert "penstock bench startup [options] MODEL [flags of penstock serve]" in text
    assert "penstock bench startup [options] --base-url URL -- COMMAND [ARG ...]" in text
    assert "Measure a server from exec to its first token." in text
    for flag, value in (
        ("--repeats", "N"),
        ("--timeout", "S"),
        ("--output-json", "FILE"),
        ("--api-key", "KEY"),
    ):
        assert re.search(rf"^  {flag} {value} ", text, re.MULTILINE), flag
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "usage: penstock bench [-h] COMMAND ..." in text
    assert "put load on any" in text
    assert "measure a server from exec" in text


def test_every_flag_explains_itself() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for command in commands.choices.values():
        for action in command._actions:
            assert action.help, action.option_strings


# ---- the table and the files ----


def test_rows_of_the_table() -> None:
    four = ["ttft", "tpot", "itl", "e2el"]
    assert _metrics(None, closed=True) == four
    assert _metrics("", closed=False) == [*four, "ttft_including_client_queue", "e2el_including_client_queue"]
    assert _metrics("itl,ttft", closed=True) == ["itl", "ttft"]
    assert _percentiles("50") == (50.0,)


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ((), []),
        (("--output-json", "a/b.json"), ["a/b.json"]),
        (("--save-result",), ["openai-infqps-m-DATE.json"]),
        (("--result-dir", "r"), ["r/openai-infqps-m-DATE.json"]),
        (("--result-filename", "n.json"), ["n.json"]),
        (("--result-dir", "r", "--result-filename", "n.json", "--output-json", "o"), ["o", "r/n.json"]),
        (("--save-result", "--max-concurrency", "3"), ["openai-infqps-concurrency3-m-DATE.json"]),
        (("--save-result", "--backend", "openai-chat"), ["openai-chat-infqps-m-DATE.json"]),
    ],
)
def test_results_have_vllms_names(words: tuple[str, ...], paths: list[str]) -> None:
    for model in ("m", "org/m", "a/b/m"):
        result = {"model_id": model, "request_rate": "inf", "date": "DATE"}
        assert _result_paths(parsed("serve", *words), result) == [Path(path) for path in paths]


def test_a_result_is_written_into_folders_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    for _ in range(2):
        _write_json(path, {"é": [1]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1]}
    assert path.read_text().endswith("}\n")
    assert capsys.readouterr().out == f"Result written to {path}\n" * 2
    with pytest.raises(BenchError, match=f"cannot write the result to {path}/d: "):
        _write_json(path / "d", {})


# ---- startup ----


def started(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    seen: list[Any] = []

    def fake(bench: Any) -> dict[str, Any]:
        seen.append(bench)
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.bench.startup.bench_startup", fake)
    assert run("startup", *words) == 130
    return seen[0]


def test_flags_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    found = started(monkeypatch, "--", "server", "--repeats", "9", "--port", "1")
    assert found.command == ("server", "--repeats", "9", "--port", "1")
    assert (found.base_url, found.model, found.headers) == ("http://127.0.0.1:8000", None, None)
    assert (found.repeats, found.timeout) == (3, 600.0)
    words = (
        "--base-url",
        "http://h:1/v1",
        "--model",
        "m",
        "--api-key",
        "k",
        "--repeats",
        "2",
        "--timeout",
        "4",
    )
    found = started(monkeypatch, *words, "--", "server")
    assert (found.base_url, found.model) == ("http://h:1", "m")
    assert found.headers == {"Authorization": "Bearer k"}
    assert (found.repeats, found.timeout) == (2, 4.0)
    monkeypatch.setenv("OPENAI_API_KEY", "outer")
    assert started(monkeypatch, "--", "server").headers == {"Authorization": "Bearer outer"}


def test_flags_behind_a_model_are_ours_where_we_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = started(monkeypatch, "--repeats", "5", "--timeout", "7", "m", "--timeout", "8", "--seed", "1")
    assert (found.repeats, found.timeout) == (5, 8.0)
    assert found.command[3] == "serve"
    assert found.command[4] == "m"
    assert found.command[-2:] == ("--seed", "1")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", found.base_url)
    # what is ours only in part, or help, is the server's
    found = started(monkeypatch, "m", "--repeat", "9", "-h")
    assert found.repeats == 3
    assert found.command[-3:] == ("--repeat", "9", "-h")


@pytest.mark.parametrize("flag", ["--host", "--port", "--port=5", "--host=x"])
def test_where_a_model_listens_is_chosen_here(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("startup", "m", flag, "5") == 1
    assert "--host and --port are chosen here; leave them out after MODEL" in capsys.readouterr().err


def test_an_interrupt_before_anything_was_measured_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch, "m")
    assert capsys.readouterr().err == "penstock bench: interrupted before anything was measured\n"
