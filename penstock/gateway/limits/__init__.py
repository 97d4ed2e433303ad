"""Limits that all workers and gateways keep together.

Counters ─┬─ leased.py   within leases from a bank: the ledger's database, or memory
          └─ valkey.py   one script of Redis or Valkey for each decision
"""
