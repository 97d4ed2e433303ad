"""How long `penstock costs` takes over a large ledger, and what roll-ups cost when rows are written.

    python -m benchmarks.gateway.costs [--rows 10000000] [--users 0] [--folder DIR] [--ledger FILE]

A SQLite ledger of 90 days is filled by SQLite itself: 200 keys of 20 teams, 40 features, 8 routes, 4 models
in 2 pools, 1,200 series; with `--users N`, a feature for each of N users instead. The roll-ups are then made
by the migration that an older ledger gets them from. Every report is a process of its own (`--format json`),
as a user waits for it, and its dollars are compared with the sum over the rows. Writes results/….json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.common import save
from penstock.gateway.ledger.idle import claim
from penstock.gateway.ledger.rollups import DAY
from penstock.gateway.ledger.schema import ledger, rollups, series
from penstock.gateway.ledger.store import Entry, Position, Store
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.policy.idle import Terms
from penstock.gateway.records import Row

BEGIN = 20_500 * DAY
DAYS = 90
_FILL = """
INSERT INTO ledger (worker, number, id, at, key_id, key_name, team, feature, tags, endpoint, route, upstream,
  replica, model, status, "end", attempts, input_tokens, output_tokens, cached_tokens, device_seconds,
  device_seconds_estimated, pool, device, dollars, comparator_dollars, waited, first_byte, total,
  settlement, reserved_tokens, reserved_dollars, reserved_device_seconds, charged, context, uncapped)
WITH RECURSIVE c(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM c WHERE x + 1 < :rows),
  h AS (SELECT x, (x * 2654435761) % 4294967291 AS r FROM c),
  k AS (SELECT x, r, r % 200 AS key, (r / 200) % 3 AS f, (r / 600) % 2 AS m, r % 1900 AS n FROM h),
  d AS (SELECT *, CASE WHEN :users THEN 'user-' || (r % :users) ELSE 'feature-' || ((key * 7 + f) % 40) END
    AS feature, (key * 7 + f) % 8 AS route, ((key * 7 + f) % 2) * 2 + m AS model FROM k)
SELECT 'w', x, printf('req-%016x', r * 16777216 + x), :begin + x * :step, 'key_' || key, 'name-' || key,
  'team-' || (key % 20), feature, json_object('feature', feature), '/v1/chat/completions', 'route-' || route,
  'model-' || model, 'model-' || model || '/0', 'model-' || model, 200, 'done', 1, 100 + n, 20 + n % 300,
  n / 2, 50000000 + n * 100000, 0, CASE model % 2 WHEN 0 THEN 'l4' ELSE 'h100' END, 'GPU', 10000 + n * 20,
  30000 + n * 60,
  1000000, 40000000, 900000000, 'settled', 3000, 100000, 900000000, '{}', 8192, 0 FROM d
"""
REPORTS = {
    "by feature": ["--by", "feature"],
    "by day, team": ["--by", "day,team"],
    "by key, model": ["--by", "key,model"],
    "one team by feature": ["--by", "feature", "--team", "team-3"],
    "30 days by the minute, by route": [
        "--since",
        "2026-03-01T10:17",
        "--until",
        "2026-03-31T21:43",
        "--by",
        "route",
    ],
}


def fill(store: Store, rows: int, users: int) -> dict[str, float]:
    """A ledger of so many rows; how long its parts took."""
    took: dict[str, float] = {}
    with store.engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-1000000"):
            driver.execute(f"PRAGMA {pragma}").close()
        with connection.begin():
            for index in ledger.indexes:
                index.drop(connection)
            begun = time.monotonic()
            step = DAYS * DAY // rows
            connection.execute(sa.text(_FILL), {"rows": rows, "users": users, "begin": BEGIN, "step": step})
            took["fill_seconds"] = time.monotonic() - begun
            begun = time.monotonic()
            for index in ledger.indexes:
                index.create(connection)
            took["index_seconds"] = time.monotonic() - begun
        with connection.begin():
            begun = time.monotonic()
            for version in ("v0005_rollups", "v0008_losses"):
                import_module(f"penstock.gateway.ledger.migrations.versions.{version}")._fill(connection)
            took["rollup_seconds"] = time.monotonic() - begun
    terms = {"l4": Terms(4, 710_000_000, 4, "L4"), "h100": Terms(2, 3_900_000_000, 2, "H100")}
    claim(store, "w", terms, dict.fromkeys(terms, BEGIN), BEGIN + DAYS * DAY)
    return took


def report(url: str, flags: list[str]) -> tuple[float, float, dict[str, Any]]:
    """One, as a user waits for it: seconds, those of a processor, and what it says."""
    command = [sys.executable, "-m", "penstock", "costs", "--ledger", url, "--format", "json", *flags]
    used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, check=True, timeout=600)
    took, now = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, json.loads(done.stdout)


def write_cost(folder: Path, batch: int) -> dict[str, float]:
    """Microseconds of a processor for each row that a store applies, in batches, with roll-ups and without.
    Nearly every row of a batch is of another series, which is the worst that can be."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    rows = 40 * batch
    for turn in range(3):
        for kind, speeds in found.items():
            store = Store(f"sqlite:///{folder / f'write-{batch}-{turn}-{kind}.db'}")
            store.open()
            store.register("w")
            with _switched(kind == "with", store):
                entries = [_entry(number) for number in range(rows)]
                begun = time.process_time()
                at = Position()
                for first in range(0, rows, batch):
                    end = Position(0, at.offset + 1)
                    store.apply("w", entries[first : first + batch], at, end)
                    at = end
                speeds.append((time.process_time() - begun) / rows * 1e6)
            store.close()
    return {f"{kind}_rollups": round(statistics.median(speeds), 1) for kind, speeds in found.items()}


@contextmanager
def _switched(on: bool, store: Store) -> Iterator[None]:
    from penstock.gateway.ledger import store as module

    add = module.add
    if not on:
        module.add = lambda changes, row, sign=1: None  # type: ignore[assignment]
        store.rollups.write = lambda connection, changes: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.add = add


def _entry(number: int) -> Entry:
    row = Row(
        id=f"r{number}", at=BEGIN + number * NANO // 100, key_id=f"key_{number % 50}",
        team=f"team-{number % 5}", tags={"feature": f"feature-{number % 7}"},
        endpoint="/v1/chat/completions", route="small", upstream="qwen",
        replica="qwen/0", model="qwen-8b", status=200, end="done", attempts=1,
        input_tokens=500, output_tokens=90, device_seconds=NANO // 10, pool="gpu", device="L4",
        dollars=20_000, settlement="settled",
    )  # fmt: skip
    day = f"key:{row.key_id}|dollars|day|{BEGIN // NANO}"
    return Entry(number, row, {day: 20_000})


def measure(rows: int, users: int, path: Path, runs: int) -> dict[str, Any]:
    """All of it; of a ledger that is there already, the reports alone."""
    url, there = f"sqlite:///{path}", path.exists()
    store = Store(url)
    store.open()
    took = {} if there else fill(store, rows, users)
    with store.reading() as connection:
        dollars = connection.execute(sa.select(sa.func.sum(ledger.c.dollars))).scalar_one()
        sizes = {
            table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (series, rollups)
        }
    store.close()
    times: dict[str, dict[str, list[float]]] = {}
    for name, flags in REPORTS.items():
        here = times.setdefault(name, {"seconds": [], "cpu_seconds": []})
        for _ in range(runs):
            seconds, cpu, said = report(url, flags)
            here["seconds"].append(round(seconds, 2))
            here["cpu_seconds"].append(round(cpu, 2))
        if "--since" not in flags and "--team" not in flags:
            assert said["total"]["dollars"] == dollars / NANO, (said["total"]["dollars"], dollars)
            assert said["total"]["requests"] == rows
    return {
        **{name: round(seconds, 1) for name, seconds in took.items()},
        "bytes": path.stat().st_size,
        **sizes,
        "reports": times,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the ledger is made (default: a temporary one)")
    parser.add_argument(
        "--ledger", type=Path, metavar="FILE", help="one of so many rows; made, if it is not there"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        result = measure(args.rows, args.users, args.ledger or folder / "ledger.db", args.runs)
        result["microseconds_of_a_row_written"] = {
            f"batches of {batch}": write_cost(folder, batch) for batch in (10, 256)
        }
    print(json.dumps(result, indent=1))
    arguments = {"rows": args.rows, "users": args.users, "runs": args.runs}
    save("gateway-costs" + ("-users" if args.users else ""), {"arguments": arguments, **result})


if __name__ == "__main__":
    main()
