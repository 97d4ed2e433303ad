"""Rows that survive: a journal on disk before the request goes out, a database behind it.

journal.py ─▶ writer.py ─▶ store.py (schema.py, migrations/) ─▶ report.py
keys.py: who may ask, in the same database
"""
