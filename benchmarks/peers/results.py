"""The JSON file: every run is appended and saved at once, so that an interrupted measurement can go on.

    {"benchmark", "date", "command", "machine", "model", "loads", "engines": {id: …}, "tuning": {id: …},
     "runs": [{"engine", "round", "what", "date", …}, …]}

`what` is a load's id (with "report"), "startup" or "cold-startup" (with "seconds"), "hardware" (measured
limits) or "failed" (with "reason"). The report of a load is that of `penstock bench serve`; of its rows per
request, TTFT, latency and lengths are kept here, and everything (each gap between tokens) in a file per run
under benchmarks/out/peers, which is not in the repository.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RAW = Path(__file__).resolve().parents[1] / "out" / "peers"
_DROPPED = ("configuration", "machine", "model_id", "date", "requests")


class Results:
    """One result file."""

    def __init__(self, path: Path, head: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {**head, "engines": {}, "tuning": {}, "runs": []}
        if resume and path.exists():
            old = json.loads(path.read_text())
            self.data["loads"] = {**old["loads"], **self.data["loads"]}
            self.data |= {name: old[name] for name in ("engines", "tuning", "runs")}

    @classmethod
    def read(cls, path: Path) -> Results:
        """What was measured before."""
        return cls(path, json.loads(path.read_text()), resume=True)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """In the order of measuring."""
        runs: list[dict[str, Any]] = self.data["runs"]
        return runs

    def has(self, engine: str, what: str, number: int | None = None) -> bool:
        """Whether that was measured (in that round)."""
        return any(
            run["engine"] == engine and run["what"] == what and number in (None, run["round"])
            for run in self.runs
        )

    def add(self, engine: str, number: int, what: str, **values: Any) -> None:
        """Append one run and save."""
        report = values.get("report")
        if report is not None:
            self._save_raw(engine, number, what, report)
            rows = report["requests"]
            values["report"] = {name: value for name, value in report.items() if name not in _DROPPED} | {
                "ttfts_ms": [_ms(row["ttft"]) for row in rows],
                "latencies_ms": [_ms(row["latency"]) for row in rows],
                "prompt_lens": [row["prompt_len"] for row in rows],
                "output_lens": [row["output_tokens"] for row in rows],
            }
        date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.runs.append({"engine": engine, "round": number, "what": what, "date": date, **values})
        self.save()

    def forget_failures(self, engine: str, number: int) -> None:
        """Before another try: what failed in that round is measured anew."""
        self.data["runs"] = [
            run
            for run in self.runs
            if not (run["what"] == "failed" and run["engine"] == engine and run["round"] == number)
        ]

    def save(self) -> None:
        """Write the file; it is complete at every moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(_dump(self.data))
        partial.replace(self.path)

    def _save_raw(self, engine: str, number: int, what: str, report: dict[str, Any]) -> None:
        RAW.mkdir(parents=True, exist_ok=True)
        (RAW / f"{self.path.stem}-{engine}-{what}-{number}.json").write_text(json.dumps(report))

    # ── what the tables and plots ask ──────────────────────────────────────────────────────────────

    def reports(self, engine: str, load: str) -> Iterator[dict[str, Any]]:
        """The reports of one load, round by round."""
        return (run["report"] for run in self._of(engine, load) if "report" in run)

    def median(self, engine: str, load: str, metric: str) -> float | None:
        """The median over rounds of one key of the report; None if it was not measured."""
        values = [report.get(metric) for report in self.reports(engine, load)]
        return _median([value for value in values if value is not None])

    def seconds(self, engine: str, what: str = "startup", phase: str = "first_token_s") -> float | None:
        """The median of a start-up."""
        return _median([run["seconds"][phase] for run in self._of(engine, what) if phase in run["seconds"]])

    def limit(self, engine: str, name: str) -> float | None:
        """The median of a limit of the machine, measured right before this engine."""
        return _median([run[name] for run in self._of(engine, "hardware")])

    def best_limit(self, name: str) -> float | None:
        """The highest value of a limit of the machine that was measured at any moment."""
        return max((run[name] for run in self.runs if run["what"] == "hardware"), default=None)

    def failures(self, engine: str) -> list[str]:
        """Why it could not be measured, each reason once."""
        return list(dict.fromkeys(run["reason"] for run in self._of(engine, "failed")))

    def rounds(self) -> int:
        """How many rounds have begun."""
        return len({run["round"] for run in self.runs if "report" in run})

    def _of(self, engine: str, what: str) -> Iterator[dict[str, Any]]:
        return (run for run in self.runs if run["engine"] == engine and run["what"] == what)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 2)


def _dump(data: dict[str, Any]) -> str:
    """One line per run: readable differences, and a tenth of the lines."""
    runs = ",\n  ".join(json.dumps(run) for run in data["runs"])
    head = json.dumps({name: value for name, value in data.items() if name != "runs"}, indent=1)
    return f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n'
