"""The row of a batch, from what was reserved to what was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from penstock.gateway.ledger.schema import accounts, ledger
from penstock.gateway.ledger.store import Store
from penstock.gateway.metering import unit_of
from penstock.gateway.policy.amounts import Amounts


def settle_row(
    store: Store, worker: str, number: int, figures: Mapping[str, Any], used: Amounts
) -> bool | None:
    """Write a row's last figures, and correct the accounts that it was charged to, in one transaction. False
    where it is not `unsettled` any more, None where it is not there yet. Blocks; raises StoreDown."""
    mine = sa.and_(ledger.c.worker == worker, ledger.c.number == number)
    with store.writing(durable=True) as connection:
        found = connection.execute(
            sa.select(ledger.c.charged, ledger.c.settlement).where(mine).with_for_update()
        ).one_or_none()
        if found is None:
            return None
        if found.settlement != "unsettled":
            return False
        charged = {id: used.of(unit_of(id)) for id in found.charged}
        connection.execute(ledger.update().where(mine).values(**figures, charged=charged))
        for id, amount in sorted(charged.items()):  # as everybody locks them
            correction = accounts.c.used + (amount - found.charged[id])
            connection.execute(accounts.update().where(accounts.c.id == id).values(used=correction))
    return True
