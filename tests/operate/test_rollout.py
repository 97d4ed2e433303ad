"""`penstock rollout` with a real gateway in front of two upstreams: one may be bad, or slow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.evaluate.result import Comparison, Result, SideResult, Spent
from penstock.evaluate.statistics import Pair, compare
from penstock.fleet.catalogue import find_model
from penstock.operate.rollout.admin import AdminApi
from penstock.operate.rollout.judge import Figures, Limits, judge, lower_bound, weights_for
from penstock.operate.rollout.run import Runner, promote
from penstock.operate.rollout.state import Rollout, StateFile
from penstock.operate.rollout.verdict import passed, wanted
from penstock.spec.load import loads
from penstock.spec.routes import Target
from tests.gateway.process import Process, gateway
from tests.gateway.upstream import Upstream, Wire, answer, status

SECRET = "admin-0123456789abcdef"
SPEC = """
upstreams:
  old: {{url: "{old}", models: {{m: {{name: Qwen/Qwen3-8B}}}}}}
  new: {{url: "{new}", models: {{m: {{name: {name}}}}}}}
routes: {{chat: {{targets: [{{model: m, upstream: old}}, {{model: m, upstream: new, weight: 0}}]}}}}
gateway: {{port: 0, admin: {{key_env: ADMIN_KEY}}}}
"""
BODY = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
FAST = ["--steps", "50,100", "--hold", "0s", "--min-requests", "4", "--poll", "50ms"]


class World:
    """A gateway, its two upstreams, and clients that ask it until the end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.old, self.new = Upstream().start(), Upstream().start()
        self.spec = SPEC.format(old=self.old.url, new=self.new.url, name=name)
        self.folder = folder
        self.process = Process(folder, self.spec, environment={"ADMIN_KEY": SECRET})
        self.statuses: list[int] = []
        self._over = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(2)]
        for client in self._clients:
            client.start()

    def _ask(self) -> None:
        # paced and without a number: a candidate whose circuit is open gets its next request seconds later
        while not self._over.wait(0.005):
            with contextlib.suppress(OSError):
                self.statuses.append(self.process.post("/v1/chat/completions", BODY).status)

    def start(self, *flags: str) -> int:
        return main(["rollout", "start", "chat", *self.where(), *flags])

    def where(self) -> list[str]:
        return ["--spec", str(self.folder / "penstock.yaml"), "--url", self.process.url]

    @property
    def api(self) -> AdminApi:
        return AdminApi(self.process.url, SECRET)

    def close(self) -> None:
        self._over.set()
        for client in self._clients:
            client.join()
        self.process.close()
        self.old.stop()
        self.new.stop()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setenv("ADMIN_KEY", SECRET)
    opened: list[World] = []

    def open_world(name: str = "Qwen/Qwen3-8B") -> World:
        opened.append(World(tmp_path, name))
        return opened[-1]

    yield open_world
    for each in opened:
        each.close()


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ".penstock" / "rollout-chat.json").read_text())
    return found


def test_a_good_candidate_is_promoted(
    world: Callable[..., World], capsys: pytest.CaptureFixture[str]
) -> None:
    it = world()
    assert it.start("--to", "m@new", *FAST, "--max-latency-ratio", "0") == 0
    assert it.api.weights("chat") == {"m@old": 0, "m@new": 1}
    written = state(it.folder)
    assert [event["share"] for event in written["events"]] == [0.5, 1, 1]
    assert written["phase"] == "promoted"
    assert written["before"] == {"m@old": 1, "m@new": 0}
    assert written["verdict"].startswith("none was wanted")
    assert written["events"][-1]["figures"]["candidate"]["attempts"] >= 4
    assert "targets: [{model: m, upstream: new}]" in capsys.readouterr().err
    # and back again, all the same
    assert main(["rollout", "abort", "chat", *it.where(), "--reason", "it drinks"]) == 0
    assert it.api.weights("chat") == {"m@old": 1, "m@new": 0}
    assert main(["rollout", "status", "chat", "--spec", str(it.folder / "penstock.yaml")]) == 0
    assert "aborted: it drinks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [(status(500), "failed, 0 were answered with 4xx"), (status(404), "0 failed, ")],
    ids=["fails", "does not know the model"],
)
def test_a_bad_candidate_is_aborted(
    world: Callable[..., World], behaviour: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    it = world()
    it.new.default = behaviour
    assert it.start("--to", "m@new", *FAST) == 1
    assert it.api.weights("chat") == {"m@old": 1, "m@new": 0}
    written = state(it.folder)
    assert written["phase"] == "aborted"
    assert why in written["events"][-1]["what"]
    said = capsys.readouterr().err
    assert "aborted at 50 %" in said
    if behaviour.__closure__[1].cell_contents == 500:  # what failed was made good by the other one
        assert set(it.statuses) == {200}


def test_a_slow_candidate_is_aborted(world: Callable[..., World]) -> None:
    it = world()

    async def slowly(wire: Wire) -> None:
        await asyncio.sleep(0.3)
        await answer(wire)

    it.new.default = slowly
    assert it.start("--to", "m@new", *FAST, "--max-latency-ratio", "0", "--e2e-p95", "200ms") == 1
    last = state(it.folder)["events"][-1]
    assert "P95 to the first byte" in last["what"] or "P95 to the end" in last["what"]
    assert last["figures"]["candidate"]["total"] > 0.2


def test_a_rollout_goes_on_where_it_was(
    world: Callable[..., World], capsys: pytest.CaptureFixture[str]
) -> None:
    it = world()
    file = StateFile(it.folder / ".penstock" / "rollout-chat.json")

    class Killed(BaseException):
        pass

    def killed(_: float) -> None:
        if file.read().step == 1:  # type: ignore[union-attr]
            raise Killed

    limits = {"min_requests": 4, "hold": 0.0, "latency_ratio": 0.0}
    file.write(
        Rollout(
            route="chat", candidate="m@new", url="", steps=[0.2, 0.6, 1.0], limits=limits,
            before=it.api.weights("chat"), verdict="",
        )
    )  # fmt: skip
    with pytest.raises(Killed):
        Runner(file, it.api, print, poll=0, sleep=killed).run()
    assert it.api.weights("chat") == {"m@old": 0.4, "m@new": 0.6}  # and there they stay
    capsys.readouterr()
    assert main(["rollout", "start", "chat", *it.where(), "--to", "m@old"]) == 2
    assert "m@new is being rolled out, and has 60 %" in capsys.readouterr().err
    # it had been set to the next step, and could not write that down
    it.api.weigh("chat", {"m@old": 0, "m@new": 1}, "")
    assert it.start("--poll", "50ms") == 0
    assert [event["share"] for event in state(it.folder)["events"]] == [0.2, 0.6, 1, 1]


def test_whoever_else_changes_weights_is_not_overruled(
    world: Callable[..., World], capsys: pytest.CaptureFixture[str]
) -> None:
    it = world()
    (it.folder / ".penstock").mkdir()
    file = StateFile(it.folder / ".penstock" / "rollout-chat.json")
    limits = {"min_requests": 1_000_000}
    given = {"route": "chat", "candidate": "m@new", "url": "", "limits": limits, "verdict": ""}
    file.write(Rollout(**given, steps=[0.5, 1.0], before=it.api.weights("chat")))
    runner = Runner(file, it.api, print)
    assert runner._look() is None
    it.api.weigh("chat", {"m@old": 0.9, "m@new": 0.1}, "mine")
    with pytest.raises(StartupError, match=r"not those of this rollout any more: m@old 0\.9, m@new 0\.1"):
        runner._look()
    # promote by another shell: whoever watches hears of it
    assert promote(file, it.api, 0.0).phase == "promoted"
    assert Runner(file, it.api, print).run() == "promoted"
    assert main(["rollout", "promote", "chat", *it.where()]) == 2
    assert "is promoted already" in capsys.readouterr().err


def test_a_smaller_model_needs_a_verdict(
    world: Callable[..., World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = world("Qwen/Qwen3-0.6B")
    assert it.start("--to", "m@new", *FAST) == 2
    said = capsys.readouterr().err
    assert "An evaluation is wanted first: m@new is smaller" in said
    report = tmp_path / "result.json"
    for verdict, status_, says in (
        ("worse", 2, "does not let it pass: small: worse (-9.0 points on 300 examples of set.jsonl)"),
        ("too small to tell", 2, "does not let it pass"),
        ("not worse", 0, "promoted"),
    ):
        report.write_text(json.dumps(reported(verdict)))
        flags = ["--verdict", str(report), "--max-latency-ratio", "0"]
        assert it.start("--to", "m@new", *FAST, *flags) == status_
        assert says in capsys.readouterr().err
    assert state(it.folder)["verdict"].startswith("small: not worse")


def reported(verdict: str) -> dict[str, Any]:
    """What `penstock eval --output-json` writes, of its own types."""
    pairs = [Pair(1.0, 1.0)] * 273 + [Pair(1.0, 0.0)] * 27
    finding = replace(compare(pairs, margin=0.02), verdict=verdict)  # type: ignore[arg-type]
    spent = Spent(
        answers=300,
        refused=0,
        latency_mean=1.0,
        latency_p50=1.0,
        latency_p95=1.0,
        prompt_tokens=None,
        completion_tokens=None,
        cached_tokens=None,
        device_time=None,
        nanodollars=None,
        cut=0,
        concurrency=(1,),
        first_asked=None,
        last_asked=None,
        fingerprints=(),
    )
    side = SideResult("small", {}, "", 0.91, 300, 0, spent, None)
    result = Result(
        set="set.jsonl", sha256="", examples=300, skipped=(), margin=0.02, confidence=0.95, baseline=side,
        candidates=[side], comparisons=[Comparison("small", finding, {}, (), ())], stopped=None,
    )  # fmt: skip
    return result.as_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stopped": "a server went down"}, "is not complete: a server went down"),
        ({"comparisons": []}, "compares nobody"),
        ({"comparisons": [{"candidate": "a"}, {"candidate": "b"}]}, "compares a, b"),
        ({"comparisons": 3}, "is no report of `penstock eval`"),
        ({"comparisons": [{"candidate": "x", "finding": None}]}, "does not let it pass: x: nothing"),
    ],
)
def test_reports_that_let_nobody_pass(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(reported("better") | change))
    with pytest.raises(StartupError, match=re.escape(says)):
        passed(path, None)


QUANTISED = """
pools: {box: {hardware: H100, count: 8}}
models:
  whole: {weights: Qwen/Qwen3-8B, pool: box}
  int4: {weights: Qwen/Qwen3-8B, pool: box, quantization: awq, engine: vllm}
  larger: {weights: Qwen/Qwen3-32B, pool: box}
  mine: {weights: /nowhere, pool: box}
"""


@pytest.mark.parametrize(
    ("candidate", "other", "says"),
    [
        ("int4", "whole", "int4 has 4 bits for each weight, and whole has 16"),
        ("whole", "larger", "whole is smaller: 8.19 billion parameters, and larger has 32.8"),
        ("larger", "whole", None),
        ("whole", "int4", None),
        ("whole", "whole", None),
        ("mine", "whole", "nobody can tell from the spec"),
    ],
)
def test_who_needs_a_verdict(candidate: str, other: str, says: str | None) -> None:
    spec = loads(QUANTISED)
    why = wanted(spec, Target(model=candidate), [Target(model=other)], find_model)
    assert (says is None and why is None) or (says is not None and why is not None and says in why)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--to", "m@third"], "'m@third' is none: the targets of chat are m@old, m@new"),
        ([], "Say with --to which target is the candidate"),
        (["--to", "m@new", "--steps", "5,1"], "--steps is '5,1'"),
        (["--to", "m@new", "--steps", "5,50"], "--steps is '5,50'"),
        (["--to", "m@new", "--hold", "soon"], "--hold"),
        (["--to", "m@new", "--max-error-rate", "-1"], "--max-error-rate is -1"),
        (["--to", "m@new", "--verdict", "nowhere.json"], "--verdict nowhere.json cannot be read"),
        (["--to", "m@new", "--no-verdict", "x"], "does not answer"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ADMIN_KEY", SECRET)
    spec = tmp_path / "penstock.yaml"
    spec.write_text(SPEC.format(old="http://a", new="http://b", name="x"))
    where = ["--spec", str(spec), "--url", "http://127.0.0.1:9"]
    assert main(["rollout", "start", "chat", *where, *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / ".penstock" / "rollout-chat.json").exists()


def test_a_gateway_without_an_admin_api_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream = Upstream().start()
    text = SPEC.format(old=upstream.url, new=upstream.url, name="Qwen/Qwen3-8B")
    monkeypatch.setenv("ADMIN_KEY", SECRET)
    with gateway(tmp_path, text.replace(", admin: {key_env: ADMIN_KEY}", "")) as process:
        (tmp_path / "penstock.yaml").write_text(text)
        where = ["--spec", str(tmp_path / "penstock.yaml"), "--url", process.url]
        assert main(["rollout", "start", "chat", *where, "--to", "m@new"]) == 2
        assert "it has no admin API there" in capsys.readouterr().err
    upstream.stop()


# ---- the judge ----

WELL = Figures(attempts=1000, failed=5, timed=995, first=0.1, total=1.0)


@pytest.mark.parametrize(
    ("candidate", "elapsed", "kind"),
    [
        (Figures(), 0, "wait"),
        (Figures(attempts=3, failed=1), 0, "wait"),  # one of three may be chance
        (Figures(attempts=3, failed=3), 0, "give up"),  # three of three are not
        (Figures(attempts=3, refused=3), 0, "give up"),
        (Figures(attempts=99, timed=99, first=0.1, total=1.0), 1e6, "wait"),
        (Figures(attempts=100, timed=100, first=0.1, total=1.0), 299, "wait"),
        (Figures(attempts=100, timed=100, first=0.1, total=1.0), 300, "go on"),
        (Figures(attempts=100, failed=1, timed=99, first=0.1, total=1.0), 300, "go on"),
        (Figures(attempts=100, failed=2, timed=98, first=0.1, total=1.0), 300, "give up"),
        (Figures(attempts=100, timed=100, first=0.126, total=1.0), 1, "give up"),
        (Figures(attempts=100, timed=100, first=0.124, total=1.24), 300, "go on"),
        (Figures(attempts=100, timed=100, first=0.1, total=1.26), 1, "give up"),
    ],
)
def test_the_judge(candidate: Figures, elapsed: float, kind: str) -> None:
    assert judge(candidate, WELL, Limits(), elapsed).kind == kind


def test_the_judge_without_anybody_to_compare_with() -> None:
    slow = Figures(attempts=100, timed=100, first=2.0, total=60.0)
    assert judge(slow, None, Limits(), 300).kind == "go on"
    assert judge(slow, None, Limits(ttft_p95=1.9), 300).kind == "give up"
    assert judge(slow, None, Limits(e2e_p95=60.0), 300).kind == "go on"


def test_a_lower_bound() -> None:
    assert lower_bound(0, 0) == 0
    assert lower_bound(10, 100) == pytest.approx(0.0607, abs=1e-4)  # Wilson's interval for 0.1 of 100 at 90 %
    assert lower_bound(3, 3) == pytest.approx(0.5258, abs=2e-4)


def test_the_others_divide_the_rest_as_before() -> None:
    before = {"a": 3, "b": 1, "c": 0}
    assert weights_for(0.2, list(before), "c", before) == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})
    assert weights_for(1.0, list(before), "c", before) == {"a": 0, "b": 0, "c": 1}
    assert weights_for(0.5, ["a", "c"], "a", {"a": 1, "c": 0}) == {"a": 0.5, "c": 0.5}
