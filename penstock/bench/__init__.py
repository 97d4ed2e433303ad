"""Load generation and reports, as a client of any OpenAI-compatible URL.

    prompts ──▶ load (when to send) ──▶ client (one streamed request) ──▶ report (numbers, table, JSON)
    serve    ties these into `penstock bench serve`
    startup  measures a server from exec to its first token

Knows HTTP, server-sent events and arithmetic. Knows nothing of engines, torch or tokenizers, so that
the same ruler measures Penstock and its peers. What comes down the wire is read by `penstock.http`.
"""
