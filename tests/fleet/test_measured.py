"""A plan by measurements of one's own device: what is known comes back, and how far it may be off."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.client import Outcome, RequestRecord
from penstock.bench.report import build_report
from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.fleet import catalogue
from penstock.fleet.facts import SCHEMES
from penstock.fleet.measured import Row, calibrate, predict, read
from penstock.fleet.roofline import Efficiency, Machine, fitted

TRUTH = Efficiency(memory=0.61, compute=0.33, step=0.004, all_reduce=fitted().all_reduce)
"""Of a device that is slower than those of published measurements."""


def machine(efficiency: Efficiency = TRUTH) -> Machine:
    facts, device = catalogue.find_model("llama-3.1-8b"), catalogue.find_device("L4")
    return Machine(facts, device, 1, SCHEMES["fp8"], 2, 2, efficiency)


def rows(noise: float = 0.0, seed: int = 0) -> list[Row]:
    """What would be measured on it, at several concurrencies and lengths."""
    draw, found = random.Random(seed), []
    for batch, prompt, output in ((1, 512, 128), (8, 512, 128), (32, 512, 128), (8, 2048, 64)):
        for kind in ("ttft", "throughput") if batch == 1 else ("throughput",):
            exact = predict(machine(), Row(kind, batch, prompt, output, 1.0), TRUTH)  # type: ignore[arg-type]
            value = exact * (1 + draw.uniform(-noise, noise))
            found.append(Row(kind, batch, prompt, output, value))  # type: ignore[arg-type]
    return found


def test_what_is_known_comes_back() -> None:
    """Also where nothing was measured; the published numbers are far off."""
    found = calibrate(machine(), rows()).fit
    for batch, prompt, output in ((4, 1000, 200), (16, 256, 64), (20, 1500, 300)):
        row = Row("throughput", batch, prompt, output, 1.0)
        true = predict(machine(), row, TRUTH)
        assert predict(machine(), row, found.efficiency) == pytest.approx(true, rel=0.05)
        assert abs(predict(machine(), row, fitted().efficiency) / true - 1) > 0.15
    assert 0.9 < found.low <= 1 <= found.high < 1.1
    assert found.count == 5


def test_the_error_bar_grows_with_what_measurements_disagree() -> None:
    quiet, loud = (calibrate(machine(), rows(noise, 1)).fit for noise in (0.0, 0.3))
    assert loud.high / loud.low > 1.3 * quiet.high / quiet.low
    assert loud.low <= 1 <= loud.high


def test_too_few_of_them_say_nothing() -> None:
    for some in (rows()[:2], [row for row in rows() if row.kind == "throughput"]):
        with pytest.raises(StartupError, match="a time to the first token among them"):
            calibrate(machine(), some)


# --- results of benchmarks


def result(batch: int, prompt: int = 512, output: int = 128) -> dict[str, Any]:
    """What `penstock bench serve` writes of a run in which so many requests were always under way."""
    truth = machine()
    whole = output * batch / truth.throughput(batch, prompt, output)
    first = truth.prefill(prompt) + truth.decode(1, prompt)
    records, end = [], 100.0
    for index in range(4 * batch):
        sent = 100.0 + index // batch * whole
        end = max(end, sent + whole)
        records.append(
            RequestRecord(
                index, sent, sent, [sent + first, sent + whole], sent + whole, Outcome.COMPLETED,
                prompt_tokens=prompt, output_tokens=output, tokens_from_usage=True,
            )
        )  # fmt: skip
    return build_report(records, start=100.0, end=end, num_prompts=len(records))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    found = []
    for batch in (1, 8, 32):
        path = tmp_path / f"{batch}.json"
        path.write_text(json.dumps(result(batch)))
        found.append(str(path))
    return found


def test_a_result_says_how_many_were_under_way(files: list[str]) -> None:
    found = read([Path(each) for each in files])
    assert [(row.kind, round(row.batch, 6)) for row in found] == [
        ("throughput", 1), ("ttft", 1), ("throughput", 8), ("throughput", 32),
    ]  # fmt: skip
    assert {(row.prompt, row.output) for row in found} == {(512, 128)}
    for row in found:
        assert row.value == pytest.approx(predict(machine(), row, TRUTH), rel=1e-6)


def test_vllms_result_without_whole_answers(tmp_path: Path) -> None:
    """Its default percentiles leave the end-to-end latency out."""
    plain = result(8)
    short = {key: value for key, value in plain.items() if "e2el" not in key}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, text in zip(paths, (plain, short), strict=True):
        path.write_text(json.dumps(text))
    whole, parts = read(paths)
    assert parts.batch == pytest.approx(whole.batch, rel=0.02)


def test_a_plan_by_them(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Dollars and replicas follow what the device really does; what was not measured is said."""
    asked = "plan llama-3.1-8b --gpu L4 --tp 1 --engine vllm --quantization fp8 --rate 2 --prompt 512 "
    asked += "--output 128 --ttft-p99 5s --price 0.7"
    made = {}
    for name, more in (("published", []), ("measured", ["--measured", *files])):
        assert main([*asked.split(), "--json", *more]) == 0
        made[name] = json.loads(capsys.readouterr().out)
    assert made["measured"]["roofline"]["measured"] == "here"
    assert made["measured"]["roofline"]["measurements"] == 4
    slow, fast = (each["models"][0] for each in (made["measured"], made["published"]))
    assert slow["expected"]["tpot"]["expected"] > 1.15 * fast["expected"]["tpot"]["expected"]
    bar = made["measured"]["roofline"]["error_bar"]
    assert bar["high"] / bar["low"] < 1.3
    assert not any("does not reach" in note for note in slow["notes"])
    assert main([*asked.replace("--prompt 512", "--prompt 6000").split(), "--measured", *files]) == 0
    shown = capsys.readouterr().out
    assert "requests have 6128 tokens, and 640 were measured" in shown
    assert "4 measurements of yours show" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no object"),
        ("{", "is no JSON"),
        ("{}", "has completed: None, where a positive number is wanted"),
        (json.dumps({**result(1), "output_throughput": -1}), "has output_throughput: -1"),
        (json.dumps({**result(1), "total_output_tokens": 4}), "speeds need longer ones"),
    ],
)
def test_files_that_are_no_results(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    assert main(["plan", "llama-3.1-8b", "--gpu", "L4", "--measured", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["plan", "llama-3.1-8b", "--gpu", "L4", "--measured", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err


def test_measurements_are_of_one_device(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3.1-8b", "--measured", *files]) == 2
    assert "--gpu says which" in capsys.readouterr().err
