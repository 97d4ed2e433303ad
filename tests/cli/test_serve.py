"""What `penstock serve` finds out before it starts an engine."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from penstock.cli.main import main
from penstock.engine.remote import RemoteEngine
from penstock.http.bind import bind
from penstock.http.config import HttpConfig
from penstock.observe import logs


class Launched(Exception):
    """The engine's process would have been started."""


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(config: Any, **_: Any) -> NoReturn:
        raise Launched(config)

    monkeypatch.setattr(RemoteEngine, "launch", launch)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{{")
    (tmp_path / "good.jinja").write_text("{{ messages }}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "generation_config.json").write_text('{"temperature": "hot"}')
    return tmp_path


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--chat-template", "missing.jinja", "does not exist"),
        ("--chat-template", "empty", "is a directory"),
        ("--chat-template", "binary.jinja", "can't decode"),
        ("--generation-config", "empty", "there is no generation_config.json in it"),
        ("--generation-config", "missing", "there is no generation_config.json in it"),
        ("--generation-config", "odd", "temperature='hot' must be a number"),
    ],
)
def test_files_are_looked_at_before_the_model_is_loaded(
    files: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    assert main(["serve", flag, str(files / value)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert str(files / value) in shown or flag in shown


def test_good_files_let_it_start(files: Path) -> None:
    with pytest.raises(Launched):
        main(["serve", "--port", "0", "--chat-template", str(files / "good.jinja")])


@pytest.mark.parametrize(
    ("flags", "level"),
    [([], "info"), (["--uvicorn-log-level", "error"], "error"), (["--uvicorn-log-level", "trace"], "debug")],
)
def test_one_level_holds_for_the_logs_of_both_processes(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], level: str
) -> None:
    """uvicorn's trace is our debug."""
    told: list[dict[str, Any]] = []

    def launch(config: Any, **options: Any) -> NoReturn:
        told.append(options)
        raise Launched(config)

    monkeypatch.setattr(RemoteEngine, "launch", launch)
    monkeypatch.setattr(logs, "configure", lambda process, **options: told.append(options))
    with pytest.raises(Launched):
        main(["serve", "--port", "0", "--log-format", "json", *flags])
    ours, the_engines = told[-2:]  # before them, that of a command line that asks for JSON
    assert (ours["level"], ours["format"]) == (level, "json")
    assert (the_engines["log_level"], the_engines["log_format"]) == (level, "json")


def test_a_blank_key_is_no_protection(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("VLLM_API_KEY", " ")
    assert main(["serve"]) == 2
    assert "--api-key must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag"], "unknown flag --no-such-flag"),
        (["--port", "x"], "--port"),
        (["--port", "70000"], "--port must be at most 65535"),
        (["--chat-template", "/nowhere.jinja"], "does not exist"),
        (["--uvicorn-log-level", "loud"], "--uvicorn-log-level must be one of"),
    ],
)
@pytest.mark.parametrize("asked", [["--log-format", "json"], ["--log_format=json"]])
def test_what_ends_a_start_is_json_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str, asked: list[str]
) -> None:
    with suppress(SystemExit):
        main(["serve", *asked, *flags])
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["process"]) == ("CRITICAL", "api")
    assert message in entry["message"]


def test_a_format_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--log-format", "xml"]) == 2
    assert "--log-format must be one of text, json, got 'xml'" in capsys.readouterr().err


def test_a_port_that_another_server_has_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other one still loads: it does not listen yet."""
    with bind(HttpConfig(host="127.0.0.1", port=0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--host", "127.0.0.1", "--port", str(port)]) == 2
    assert f"Port {port} is in use (127.0.0.1:{port})" in capsys.readouterr().err
