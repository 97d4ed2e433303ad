"""The ledger's migrations, shipped with the package; the store runs them when it opens."""
