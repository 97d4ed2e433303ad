"""Load generation and reports, as a client of any OpenAI-compatible URL.

    prompts ──▶ load (when to send) ──▶ client (one streamed request) ──▶ report (numbers, table, JSON)
                                          └─ sse (what came down the wire)
    serve    ties these into `penstock bench serve`
    startup  measures a server from exec to its first token

Knows HTTP, server-sent events and arithmetic. Knows nothing of engines, torch or tokenizers, so that
the same ruler measures Penstock and its peers. Nothing is imported here: `penstock chat` uses
`penstock.bench.sse` and should not pay for aiohttp.
"""
