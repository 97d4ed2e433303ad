"""How requests turned out, told after they ended: success, failure or a score, joined to rows by request id.

    tell ─▶ the row's `outcome` (and its cheaper attempt's), rollups, a line of `outcomes`: one transaction

The last word counts: what is told again as before changes nothing, and what is told otherwise (a ticket is
opened again) replaces it. Every word stays in `outcomes`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import sqlalchemy as sa

from .report import moment
from .rollups import ATTEMPT, Changes, add
from .schema import ledger, outcomes
from .store import Store, as_row

MOST_WORDS = 16
"""Outcomes that may be told of one request."""
_MANY = 500
"""Ids in one question."""

Verdict = Literal["told", "unchanged", "unknown", "late", "too_many"]


@dataclass(frozen=True, slots=True)
class Telling:
    """What is told of a request."""

    id: str
    outcome: str
    """`success`, `failure`, or a score as `score_text` has it."""


@dataclass(frozen=True, slots=True)
class Told:
    """What became of it."""

    verdict: Verdict
    at: int = 0
    """When the request arrived, Unix nanoseconds."""
    before: str | None = None
    """What was told before."""


def score_text(score: Decimal) -> str:
    """A score from 0 to 1, as it is kept: to nine decimals, without zeros at its end."""
    text = f"{score:.9f}".rstrip("0").rstrip(".")
    return text or "0"


def outcome_of(text: str) -> str | None:
    """`success`, `failure`, or a score from 0 to 1, as it is kept; None for anything else."""
    if text in ("success", "failure"):
        return text
    try:
        score = Decimal(text)
    except InvalidOperation:
        return None
    return score_text(score) if score.is_finite() and 0 <= score <= 1 else None


def tell(
    store: Store,
    wanted: Sequence[Telling],
    *,
    now: int,
    since: int,
    owner: tuple[str, str] | None = None,
) -> list[Told]:
    """Say of each request how it turned out, in one transaction, in this order. May be repeated. Raises
    StoreDown.

    Args:
        now: Unix nanoseconds, which the words are dated with.
        since: requests that arrived before are too old.
        owner: key and team; requests of others are unknown to them. None: an operator, who owns all.
    """
    found: list[Told] = []
    changes: Changes = {}
    with store.writing(durable=True) as connection:
        rows = _rows(connection, {each.id for each in wanted}, owner)
        current = {id: row["outcome"] for id, row in rows.items()}
        last = _last(connection, [(row["worker"], row["number"]) for row in rows.values()])
        for each in wanted:
            was = rows.get(each.id)
            if was is None or was["end"] == ATTEMPT:  # an attempt has the outcome of its request, and no own
                found.append(Told("unknown"))
                continue
            before, place = current[each.id], (was["worker"], was["number"])
            turn, spoken = last.get(place, (0, 0))
            if before == each.outcome or spoken > now:  # or who came later was faster
                found.append(Told("unchanged", was["at"], before))
            elif was["at"] < since:
                found.append(Told("late", was["at"], before))
            elif turn >= MOST_WORDS:
                found.append(Told("too_many", was["at"], before))
            else:
                last[place] = (turn + 1, now)
                word = {"worker": place[0], "number": place[1], "turn": turn + 1, "at": now}
                by = owner[0] if owner else ""
                connection.execute(outcomes.insert().values(**word, outcome=each.outcome, key_id=by))
                current[each.id] = each.outcome
                found.append(Told("told", was["at"], before))
        changed = [(was, current[id]) for id, was in rows.items() if current[id] != was["outcome"]]
        attempts = {was["escalated_from"] for was, _ in changed if was["escalated_from"]}
        attempts -= rows.keys()
        changed += [(was, ATTEMPT) for was in _rows(connection, attempts, owner).values()]
        for was, outcome in changed:
            row = as_row(was)
            add(changes, row, -1)
            row.outcome = outcome
            add(changes, row)
            here = sa.and_(ledger.c.worker == was["worker"], ledger.c.number == was["number"])
            connection.execute(ledger.update().where(here).values(outcome=outcome))
        store.rollups.write(connection, changes)
    return found


def unknown(store: Store, ids: Collection[str], owner: tuple[str, str] | None) -> set[str]:
    """Which of these ids no row of this owner has, or only one whose attempt is not there yet. Raises
    StoreDown."""
    found: dict[str, str | None] = {}
    with store.reading() as connection:
        for wanted in (sorted(ids), None):
            wanted = sorted(filter(None, found.values())) if wanted is None else wanted
            for some in _pieces(wanted):
                query = sa.select(ledger.c.id, ledger.c.escalated_from).where(
                    ledger.c.id.in_(some), *_owned(owner)
                )
                found |= dict(connection.execute(query).all())
    return {id for id in ids if id not in found or (found[id] and found[id] not in found)}


def words(store: Store, id: str) -> Iterator[dict[str, Any]]:
    """All that was told of a request, in its order."""
    query = (
        sa.select(outcomes.c.at, outcomes.c.outcome, outcomes.c.key_id)
        .join(ledger, sa.and_(ledger.c.worker == outcomes.c.worker, ledger.c.number == outcomes.c.number))
        .where(ledger.c.id == id)
        .order_by(outcomes.c.worker, outcomes.c.number, outcomes.c.turn)
    )
    with store.reading() as connection:
        for at, outcome, key_id in connection.execute(query):
            yield {"time": moment(at), "outcome": outcome, "key_id": key_id}


def _rows(
    connection: sa.Connection, ids: Collection[str], owner: tuple[str, str] | None
) -> Mapping[str, Any]:
    """By id, locked. Ids are drawn at random; should two rows have the same, it is the newest."""
    found: dict[str, Any] = {}
    for some in _pieces(sorted(ids)):
        query = sa.select(ledger).where(ledger.c.id.in_(some), *_owned(owner))
        for row in connection.execute(
            query.order_by(ledger.c.worker, ledger.c.number).with_for_update()
        ).mappings():
            other = found.get(row["id"])
            if other is None or other["at"] <= row["at"]:
                found[row["id"]] = row
    return found


def _owned(owner: tuple[str, str] | None) -> list[sa.ColumnElement[bool]]:
    if owner is None:
        return []
    key_id, team = owner
    own = ledger.c.key_id == key_id
    return [sa.or_(own, ledger.c.team == team) if team else own]


def _last(
    connection: sa.Connection, places: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], tuple[int, int]]:
    """Number and time of the last word of each row that has one."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    place = sa.tuple_(outcomes.c.worker, outcomes.c.number)
    for some in _pieces(places):
        query = (
            sa.select(
                outcomes.c.worker, outcomes.c.number, sa.func.max(outcomes.c.turn), sa.func.max(outcomes.c.at)
            )
            .where(place.in_(some))
            .group_by(outcomes.c.worker, outcomes.c.number)
        )
        for worker, number, turn, at in connection.execute(query):
            found[worker, number] = (turn, at)
    return found


def _pieces(whole: Sequence[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(whole), _MANY):
        yield list(whole[first : first + _MANY])
