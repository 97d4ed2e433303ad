"""`penstock eval` over loopback, from the command line to its exit status, its reports and what it asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main
from tests.evaluate.server import AnsweringServer

Serve = Callable[..., AnsweringServer]


def write_set(tmp_path: Path, count: int, **fields: Any) -> Path:
    """Questions 0, 1, 2, …, whose right answers are the same numbers."""
    path = tmp_path / "set.jsonl"
    lines = [
        {"id": f"e{n}", "prompt": str(n), "expected": str(n), "grader": "exact", **fields}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def right(text: str) -> str:
    return text


def wrong_from(first: int) -> Callable[[str], str]:
    return lambda text: text if int(text) < first else "?"


def command(tmp_path: Path, baseline: AnsweringServer, candidate: AnsweringServer, *more: str) -> list[str]:
    return [
        "eval", "--baseline", baseline.url, "--candidate", candidate.url,
        "--set", str(tmp_path / "set.jsonl"),
        "--cache", str(tmp_path / "cache"), "--output-json", str(tmp_path / "out.json"),
        "--retries", "0", *more,
    ]  # fmt: skip


def result(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


def finding(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = result(tmp_path)["comparisons"][0]["finding"]
    return found


@pytest.mark.parametrize(
    ("baseline", "candidate", "count", "verdict", "status"),
    [
        (right, right, 200, "not worse", 0),
        (wrong_from(60), right, 100, "better", 0),
        (right, wrong_from(60), 100, "worse", 1),
        (right, right, 20, "too small to tell", 3),
        (right, wrong_from(19), 20, "too small to tell", 3),
    ],
)
def test_verdicts_and_exit_statuses(
    serve: Serve,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    baseline: Callable[[str], str],
    candidate: Callable[[str], str],
    count: int,
    verdict: str,
    status: int,
) -> None:
    write_set(tmp_path, count)
    ours, theirs = serve(baseline), serve(candidate)
    assert main(command(tmp_path, ours, theirs)) == status
    assert finding(tmp_path)["verdict"] == verdict
    assert result(tmp_path)["status"] == status
    out = capsys.readouterr().out
    assert f"candidate: {verdict}" in out
    if status == 3:
        assert f"About {finding(tmp_path)['needed']:,} examples like these would tell" in out
    assert sorted(ours.asked) == sorted(theirs.asked) == sorted(map(str, range(count)))


def test_what_it_took_and_what_it_costs(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, 20)
    ours, theirs = serve(right), serve(right)
    prices = ("--baseline-price", "1:2", "--candidate-price", "3.6/h")
    main(command(tmp_path, ours, theirs, *prices))
    baseline, (candidate,) = result(tmp_path)["baseline"], result(tmp_path)["candidates"]
    assert (baseline["spent"]["prompt_tokens"], baseline["spent"]["completion_tokens"]) == (200, 100)
    assert baseline["spent"]["device_time"] == 20 * 250_000_000
    assert baseline["spent"]["nanodollars"] == 20 * (10 * 1_000 + 5 * 2_000)  # $1 and $2 per million
    assert candidate["spent"]["nanodollars"] == 20 * 250_000  # a quarter second at a tenth of a cent each
    assert 0 < baseline["spent"]["latency_p50"] <= baseline["spent"]["latency_p95"]
    out = capsys.readouterr().out
    assert "$0.0200" in out
    assert "$0.2500" in out


def test_a_baseline_that_dies_in_the_middle(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, keeps what there is, has an exit status of its own; and the same command asks the rest."""
    write_set(tmp_path, 60)
    ours, theirs = serve(right), serve(right)
    ours.dies_at = 30
    assert main(command(tmp_path, ours, theirs)) == 4
    out = capsys.readouterr().out
    assert "Not complete. The baseline is down" in out
    assert "the same command goes on" in out
    first = result(tmp_path)
    assert first["status"] == 4
    assert first["baseline"]["down"]
    assert 0 < first["baseline"]["asked"] <= 30
    assert finding(tmp_path)["pairs"] <= 30
    ours.dies_at, ours.down = None, False
    assert main(command(tmp_path, ours, theirs)) == 3
    second = result(tmp_path)
    assert finding(tmp_path)["pairs"] == 60
    assert second["stopped"] is None
    for side, server in (("baseline", ours), ("candidate", theirs)):
        before = first[side if side == "baseline" else "candidates"]
        after = second[side if side == "baseline" else "candidates"]
        before, after = (before, after) if side == "baseline" else (before[0], after[0])
        assert before["asked"] + after["asked"] == 60
        assert after["cached"] == before["asked"]
        assert after["spent"]["answers"] == 60
        assert set(Counter(server.asked)) == set(map(str, range(60)))
    # the candidate was never down: nothing was asked of it twice, nor will be of either
    assert max(Counter(theirs.asked).values()) == 1
    asked = len(ours.bodies), len(theirs.bodies)
    assert main(command(tmp_path, ours, theirs)) == 3
    assert (len(ours.bodies), len(theirs.bodies)) == asked
    assert "60 answers were kept from before" in capsys.readouterr().out


def test_failures_on_the_way_down_are_no_wrong_answers(serve: Serve, tmp_path: Path) -> None:
    """The requests that failed before the server counted as down are asked again, and not held against it."""
    write_set(tmp_path, 40)
    ours = serve(right)
    theirs = serve(lambda text: text if len(theirs.bodies) <= 20 else (500, {"error": "dying"}))
    assert main(command(tmp_path, ours, theirs)) == 4
    assert finding(tmp_path)["pairs"] == 20
    assert finding(tmp_path)["losses"] == 0
    theirs.answer = right
    assert main(command(tmp_path, ours, theirs)) == 3
    assert (finding(tmp_path)["pairs"], finding(tmp_path)["losses"]) == (40, 0)
    assert result(tmp_path)["candidates"][0]["cached"] == 20


def test_a_baseline_that_is_down_from_the_beginning(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, 5)
    ours, theirs = serve(right), serve(right)
    ours.down = True
    assert main(command(tmp_path, ours, theirs)) == 4
    assert "The baseline is down: no answer from" in capsys.readouterr().out
    assert theirs.bodies == []


def test_broken_lines_are_named_and_nothing_is_asked(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_set(tmp_path, 3)
    path.write_text(
        path.read_text() + '{"prompt": "3"\n{"prompt": "0", "expected": "0", "grader": "exact"}\n'
    )
    ours, theirs = serve(right), serve(right)
    assert main(command(tmp_path, ours, theirs)) == 2
    err = capsys.readouterr().err
    assert "line 4: it is not JSON" in err
    assert "line 5: the same request with the same grading stands in line 1" in err
    assert ours.bodies == theirs.bodies == []
    assert main(command(tmp_path, ours, theirs, "--skip-broken")) == 3
    assert finding(tmp_path)["pairs"] == 3
    assert len(result(tmp_path)["skipped"]) == 2


def test_two_examples_that_share_an_answer_pay_for_it_once(serve: Serve, tmp_path: Path) -> None:
    lines = ({"prompt": "7", "expected": "7", "grader": kind} for kind in ("exact", "numeric"))
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ours, theirs = serve(right), serve(right)
    main(command(tmp_path, ours, theirs, "--baseline-price", "1:0"))
    assert ours.asked == ["7"]
    assert finding(tmp_path)["pairs"] == 2
    assert result(tmp_path)["baseline"]["spent"]["prompt_tokens"] == 10
    assert result(tmp_path)["baseline"]["spent"]["nanodollars"] == 10_000


def test_no_answer_counts_as_wrong_and_is_shown(serve: Serve, tmp_path: Path) -> None:
    write_set(tmp_path, 50)
    ours, theirs = serve(right), serve(lambda text: (400, {"error": "too long"}) if text == "9" else text)
    main(command(tmp_path, ours, theirs))
    assert finding(tmp_path)["losses"] == 1
    (difference,) = result(tmp_path)["comparisons"][0]["differences"]
    assert difference["id"] == "e9"
    assert difference["candidate_why"] == "no answer: HTTP 400: too long"
    assert result(tmp_path)["candidates"][0]["spent"]["refused"] == 1


def test_keys_bodies_and_concurrency(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_BASELINE_API_KEY", "k1")
    monkeypatch.setenv("OPENAI_API_KEY", "k2")
    write_set(tmp_path, 30)
    ours, theirs = serve(right), serve(right)
    body = ("--body", '{"seed": 1}', "--candidate-body", '{"temperature": 0.5}', "--candidate-model", "other")
    main(command(tmp_path, ours, theirs, *body, "--concurrency", "3"))
    assert ours.headers[0]["Authorization"] == "Bearer k1"
    assert theirs.headers[0]["Authorization"] == "Bearer k2"
    assert {(each["temperature"], each["seed"], each["model"]) for each in ours.bodies} == {(0, 1, "m")}
    assert {(each["temperature"], each["seed"], each["model"]) for each in theirs.bodies} == {
        (0.5, 1, "other")
    }
    assert max(ours.most_at_once, theirs.most_at_once) <= 3
    assert "k1" not in (tmp_path / "out.json").read_text()


def test_a_key_that_is_wrong(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, 3)
    ours, theirs = serve(right), serve(lambda _: (401, {"error": {"message": "Incorrect API key"}}))
    assert main(command(tmp_path, ours, theirs)) == 2
    err = capsys.readouterr().err
    assert "The candidate: HTTP 401" in err
    assert "PENSTOCK_CANDIDATE_API_KEY" in err


def test_a_thing_is_not_compared_with_itself(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, 3)
    server = serve(right)
    assert main(command(tmp_path, server, server)) == 2
    assert "The candidate is the same as the baseline: m at" in capsys.readouterr().err
    assert main(command(tmp_path, server, server, "--candidate-body", '{"seed": 2}')) == 3
    assert len(server.bodies) == 6


def test_several_candidates_and_the_gravest_status(serve: Serve, tmp_path: Path) -> None:
    write_set(tmp_path, 200)
    ours, good, bad = serve(right), serve(right), serve(wrong_from(100))
    assert main([*command(tmp_path, ours, good), "--candidate", bad.url]) == 1
    verdicts = {each["candidate"]: each["finding"]["verdict"] for each in result(tmp_path)["comparisons"]}
    assert verdicts == {"candidate 1": "not worse", "candidate 2": "worse"}
    assert len(ours.bodies) == 200


def test_tags_and_a_server_that_changed(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, 10, tags=["t"])
    ours, theirs = serve(right), serve(wrong_from(5))
    main(command(tmp_path, ours, theirs, "--limit", "5"))
    ours.fingerprint = "fp_2"
    main(command(tmp_path, ours, theirs))
    assert result(tmp_path)["comparisons"][0]["by_tag"]["t"]["losses"] == 5
    out = capsys.readouterr().out
    assert "2 system fingerprints (fp_1, fp_2)" in out
    assert "t: 100.0 % → 50.0 % of 10" in out
    main(command(tmp_path, ours, theirs, "--again"))
    assert result(tmp_path)["baseline"]["spent"]["fingerprints"] == ["fp_2"]


def test_a_judge(serve: Serve, tmp_path: Path) -> None:
    """He sees question, reference and answer, and his word is kept like an answer."""
    write_set(tmp_path, 12, grader={"type": "judge", "scale": 5})
    (tmp_path / "rubric.txt").write_text("numbers must match")
    ours, theirs = serve(right), serve(lambda text: "?" if int(text) % 2 else text)
    judge = serve(lambda text: "bad\nGRADE: 1" if "\n?\n" in text else "fine\nGRADE: 5", model="judge")
    asked = command(tmp_path, ours, theirs, "--judge", judge.url, "--rubric", str(tmp_path / "rubric.txt"))
    main(asked)
    found = finding(tmp_path)
    assert (found["baseline"], found["candidate"]) == (1.0, pytest.approx(0.6))
    assert found["interval"]["method"] == "student"
    assert found["p_value"] is None
    assert "numbers must match" in judge.bodies[0]["messages"][0]["content"]
    count = len(judge.bodies)
    assert count == 12 + 6  # what both answered alike was judged once
    main(asked)
    assert len(judge.bodies) == count


def test_a_judge_that_says_nothing_useful_grades_nothing(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, 10, grader="judge")
    ours, theirs = serve(right), serve(right)
    judge = serve(lambda text: "hm" if "\n3\n" in text else "GRADE: 1", model="judge")
    assert main(command(tmp_path, ours, theirs)) == 2
    assert "--judge URL or MODEL" in capsys.readouterr().err
    assert main(command(tmp_path, ours, theirs, "--judge", judge.url)) == 4
    assert "1 examples could not be graded" in capsys.readouterr().out
    assert main(command(tmp_path, ours, theirs, "--judge", judge.url, "--max-ungraded", "1")) == 3
    assert finding(tmp_path)["pairs"] == 9


def test_the_page_opens_offline_and_escapes(serve: Serve, tmp_path: Path) -> None:
    evil = "</dd><script>alert(1)</script><img src=http://x/y>"
    path = write_set(tmp_path, 40, tags=["<b>"])
    path.write_text(
        path.read_text() + json.dumps({"prompt": "40", "expected": evil, "grader": "exact"}) + "\n"
    )
    ours, theirs = serve(lambda text: evil if text == "40" else text), serve(lambda text: evil)
    main(command(tmp_path, ours, theirs, "--html", str(tmp_path / "out.html")))
    page = (tmp_path / "out.html").read_text()
    assert "candidate: <strong>worse</strong>" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "src=" not in page.replace("src=http://x/y&gt;", "")
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<details>") == 40
    assert "href=" not in page


def test_reports_that_cannot_be_written_are_told_before_anything_is_asked(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path, 3)
    ours, theirs = serve(right), serve(right)
    assert main(command(tmp_path, ours, theirs, "--html", str(tmp_path))) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert ours.bodies == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_begun_again(serve: Serve, tmp_path: Path, how: signal.Signals) -> None:
    """Whatever ends it, no answer that came is asked for again."""
    write_set(tmp_path, 40)
    ours = serve(right)
    reached, go_on = threading.Event(), threading.Event()

    def hold(text: str) -> str:
        if int(text) >= 20:
            reached.set()
            theirs.gate = go_on
        return text

    theirs = serve(hold)
    asked = command(tmp_path, ours, theirs, "--concurrency", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reached.wait(60)
    process.send_signal(how)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        go_on.set()
    if how == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130, err
        assert "the same command goes on" in err
    before = Counter(theirs.asked)
    assert main(asked) == 3
    again = Counter(theirs.asked) - before
    assert finding(tmp_path)["pairs"] == 40
    assert max(again.values()) == 1
    assert not {str(n) for n in range(18)} & set(again)  # what had come is kept
    assert set(before | again) == {str(n) for n in range(40)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval"], "--baseline URL|MODEL --candidate"),
        (["eval", "demo"], "Write --quantization"),
        (["eval", "--quantization", "int8"], "needs a model"),
        (["eval", "--quantization", "int3", "demo"], "no scheme 'int3'. It has int8, w8a8, int4"),
        (["eval", "--quantization", "none", "demo"], "no scheme 'none'"),
        (["eval", "--quantization", "int8,int8", "demo"], "twice"),
        (["eval", "--quantization", "int8", "demo", "--baseline", "x"], "Leave --baseline"),
        (["eval", "--baseline", "ftp://x", "--candidate", "http://x"], "Write http://HOST"),
        (["eval", "--baseline", "http://x", "--candidate", "http://y"], "--set FILE.jsonl"),
        (["eval", "--baseline", "http://a:secret@x", "--candidate", "http://y"], "PENSTOCK_BASELINE_API_KEY"),
        (["eval", "--baseline", "/nowhere/model", "--candidate", "http://y"], "/nowhere/model"),
        (
            ["eval", "--baseline", "demo", "--baseline-model", "x", "--candidate", "http://y"],
            "a model already",
        ),
        (
            ["eval", "--baseline", "demo", "--baseline-flags", "--port 1", "--candidate", "demo"],
            "is chosen here",
        ),
        (
            ["eval", "--baseline", "http://x", "--candidate", "http://y", "--baseline-price", "1"],
            "is no price",
        ),
        (
            ["eval", "--baseline", "http://x", "--candidate", "http://y", "--set", "/x", "--grader", "no"],
            "--grader",
        ),
    ],
)
def test_commands_that_are_wrong(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_prices_of_a_spec(serve: Serve, tmp_path: Path) -> None:
    write_set(tmp_path, 4)
    ours, theirs = serve(right), serve(right)
    (tmp_path / "penstock.yaml").write_text(
        "pools: {gpu: {price_per_hour: 7.2}}\n"
        f"upstreams:\n  cloud: {{url: '{ours.url}/v1', models: {{m: {{price: {{"
        "input: 1, output: 2, as_of: 2026-01-01, source: here}}}}\n"
        f"  own: {{url: '{theirs.url}', pool: gpu, models: {{m: {{}}}}}}\n"
    )
    main(command(tmp_path, ours, theirs, "--spec", str(tmp_path / "penstock.yaml")))
    assert result(tmp_path)["baseline"]["spent"]["nanodollars"] == 4 * 20_000
    assert result(tmp_path)["candidates"][0]["spent"]["nanodollars"] == 4 * 500_000
    assert result(tmp_path)["baseline"]["price"] == "upstreams.cloud.models.m, of 2026-01-01"


@pytest.mark.slow
def test_the_demo_model_against_itself_quantised(tmp_path: Path) -> None:
    """Two real engines, one after another, in one command; and again without any, from what is kept."""
    asked = [
        sys.executable, "-m", "penstock", "eval", "--quantization", "int8", "demo", "--limit", "5",
        "--cache", str(tmp_path / "cache"), "--output-json", str(tmp_path / "out.json"),
        "--engine-flags", "--threads 1", "--baseline-price", "3.6/h",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 3, done.stderr
    assert "baseline: starting its engine" in done.stderr
    assert "int8: starting its engine" in done.stderr
    first = result(tmp_path)
    assert first["baseline"]["score"] == 1.0  # the first lines of the set are what the model has learnt
    assert first["comparisons"][0]["candidate"] == "int8"
    spent = first["baseline"]["spent"]
    assert spent["device_time"] > 0
    assert spent["nanodollars"] == pytest.approx(spent["device_time"] * 3.6 / 3600, abs=5)
    again = subprocess.run(asked, capture_output=True, text=True, timeout=60, env=environment)
    assert again.returncode == 3
    assert "starting" not in again.stderr
    assert result(tmp_path)["baseline"]["cached"] == 5


def test_the_demos_set_is_what_its_tool_makes() -> None:
    from penstock import assets
    from penstock.evaluate.dataset import read_dataset
    from tools.demo.evaluation import lines

    path = Path(str(assets.__file__)).parent / "evaluation" / "demo.jsonl"
    assert path.read_text("utf-8") == "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines())
    assert len(read_dataset(path).examples) == 774
