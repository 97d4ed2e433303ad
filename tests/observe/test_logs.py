"""Lines of the log: one format, one line for one event, whoever writes it and whatever it says."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.observe import logs
from penstock.observe.logs import JsonFormatter, TextFormatter
from tests.own_logging import kept_logging

HEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ +engine\[\d+\] ")

Lines = Callable[[], list[Any]]


@pytest.fixture
def process_state() -> Iterator[None]:
    with kept_logging():
        yield


@pytest.fixture
def text(process_state: None, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Lines in text, since the last look."""
    logs.configure("engine")
    return lambda: capsys.readouterr().err.splitlines()


@pytest.fixture
def objects(process_state: None, capsys: pytest.CaptureFixture[str]) -> Lines:
    """The same in JSON."""
    logs.configure("engine", format="json")
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def record(message: str, *args: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("penstock.x", logging.INFO, __file__, 1, message, args, None)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_a_line_has_time_level_process_and_message(text: Lines) -> None:
    logging.getLogger("anybody").warning("%d of %s", 3, "them")
    (line,) = text()
    assert HEAD.match(line)
    assert line.split(" ", 2)[2].startswith("WARNING  engine[")
    assert line.endswith("] 3 of them")


def test_an_object_has_the_same_and_its_fields(objects: Lines) -> None:
    logging.getLogger("anybody").warning("%d of %s", 3, "them", extra={"fields": {"status": 200}})
    (entry,) = objects()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry.pop("pid") > 0
    assert entry == {
        "level": "WARNING",
        "process": "engine",
        "logger": "anybody",
        "message": "3 of them",
        "status": 200,
    }


def test_a_table_and_a_traceback_are_marked_lines_of_the_same_beginning(text: Lines) -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("x").exception("first\nsecond")
    lines = text()
    assert all(HEAD.match(line) for line in lines)
    said = [HEAD.sub("", line) for line in lines]
    assert said[:3] == ["first", "| second", "| Traceback (most recent call last):"]
    assert said[-2:] == ["| ValueError: a", "| b"]


def test_a_traceback_stays_within_its_object(objects: Lines) -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("x").exception("what")
    logging.getLogger("x").error("another's", extra={"trace": "Traceback:\n  of another process\n"})
    own, another = objects()
    assert own["message"] == "what"
    assert own["exception"].startswith("Traceback")
    assert own["exception"].endswith("ValueError: a\nb")
    assert another["exception"] == "Traceback:\n  of another process"


@given(st.text(st.characters(), max_size=60))
def test_no_text_looks_like_a_line_of_ours(sent: str) -> None:
    """Whatever a client gets into a message: each line has our beginning, and only the first has no mark."""
    first, *more = TextFormatter("engine").format(record("A client sent %s", sent)).split("\n")
    for line in (first, *more):
        assert HEAD.match(line)
        assert "\r" not in line
        assert len(line.splitlines()) == 1
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)
    assert len(more) == sent.count("\n")
    assert all(HEAD.sub("", line, count=1).startswith("| ") for line in more)
    whole = JsonFormatter("engine").format(record("A client sent %s", sent))
    assert whole.isascii()
    assert whole.isprintable()
    assert json.loads(whole)["message"] == f"A client sent {sent}"


def test_arguments_that_do_not_fit_are_no_second_failure(text: Lines) -> None:
    logging.getLogger("x").error("%d", "no number")
    (line,) = text()
    assert line.endswith("%d (TypeError in its arguments)")


def test_fields_of_any_type(objects: Lines) -> None:
    logging.getLogger("x").error("m", extra={"fields": {"odd": {1}}})
    assert objects()[0]["odd"] == "{1}"


def test_warnings_of_python_are_lines(text: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._warn
        warnings.warn("this is old", UserWarning, stacklevel=1)
    (line,) = text()
    assert "WARNING" in line
    assert "UserWarning: this is old (" in line


def test_libraries_handlers_are_taken_away(objects: Lines) -> None:
    loud = logging.getLogger("a.loud.library")
    loud.addHandler(logging.StreamHandler(sys.stderr))
    loud.propagate = False
    logs.adopt()
    loud.warning("once")
    (entry,) = objects()
    assert (entry["message"], entry["logger"]) == ("once", "a.loud.library")


def test_handlers_stay_where_the_logging_is_somebody_elses() -> None:
    own, handler = logging.getLogger("of.a.notebook"), logging.StreamHandler(sys.stderr)
    own.addHandler(handler)
    logs.adopt()
    assert own.handlers == [handler]
    own.removeHandler(handler)


@pytest.mark.parametrize(
    ("level", "shown"), [("info", "iwc"), ("warning", "wc"), ("critical", "c"), ("trace", "diwc")]
)
def test_levels(process_state: None, capsys: pytest.CaptureFixture[str], level: str, shown: str) -> None:
    logs.configure("engine", level=level)
    logger = logging.getLogger("x")
    logger.log(5, "t")  # uvicorn's trace has headers in it, and keys in those
    for name in ("debug", "info", "warning", "critical"):
        getattr(logger, name)(name[0])
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == shown


@pytest.mark.parametrize("form", logs.FORMATS)
def test_what_nobody_catches_is_a_line_too(form: str) -> None:
    """In the main thread, in another one, and where nothing can be raised."""
    code = f"""
import logging, threading
from penstock.observe import logs
logs.configure("api", format={form!r})
class Odd:
    def __del__(self):
        raise RuntimeError("in del")
def fail():
    raise OSError("in a thread")
thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
Odd()
raise ValueError("in main")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not done.stdout
    lines = done.stderr.splitlines()
    if form == "json":
        entries = [json.loads(line) for line in lines]
        assert [entry["level"] for entry in entries] == ["ERROR", "ERROR", "CRITICAL"]
        assert "uncaught OSError in worker" in entries[0]["message"]
        assert entries[2]["message"] == "uncaught ValueError: in main"
        traces = [entry["exception"] for entry in entries]
    else:
        assert all(re.match(r"\S+ \S+ [A-Z]+ +api\[\d+\] ", line) for line in lines)
        traces = ["\n".join(lines)] * 3
    for trace, error in zip(traces, ("in a thread", "in del", "in main"), strict=True):
        assert f"Error: {error}" in trace


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["serve", "--log-format", "json"], True),
        (["serve", "--log_format=json", "--nonsense"], True),
        (["serve", "--log-format", "text", "json"], False),
        (["json", "--log-format"], False),
        ([], False),
    ],
)
def test_a_command_line_that_asks_for_json(arguments: list[str], wanted: bool) -> None:
    assert logs.wants_json(arguments) is wanted


def test_complaints_are_plain_before_there_is_a_log(
    process_state: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.complain("penstock serve: no such file")
    assert capsys.readouterr().err == "penstock serve: no such file\n"
    assert not logs.configured()
    logs.configure("api")
    logs.complain("penstock serve: no such file")
    assert re.search(r"CRITICAL api\[\d+\] penstock serve: no such file\n", capsys.readouterr().err)
    assert (logs.configured(), logs.in_json()) == (True, False)
    logs.configure("api", format="json")
    assert logs.in_json()
