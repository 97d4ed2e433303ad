"""Examining an engine that runs, by its URL, and the log of one that does not.

    snapshot   what the engine tells: metrics, models, health, version; and what this machine shows: HTTP
    points     the checklists, each point a pure function of the snapshot: value, verdict, advice
    logs       the error tables, matched against a log of any kind and length: pure, bounded
    report     for people and as JSON

An engine is known by what it answers; vLLM as well as ours.
"""
