"""Transport, both directions: what any HTTP process of Penstock does alike, whatever it serves or asks.

    config ─▶ serve (bind · uvicorn · signals · drain)
                └─ listener · limits ─▶ connection
                     └─ layers (CORS · errors · keys) ─▶ endpoint: body · exchange · ids · sse
    chunks    OpenAI's streams and errors, read by a client: bench, chat, a gateway

Knows bytes, ASGI and the tree in `core.errors`. Knows no engine, no model, no text and no metric, so that a
gateway is built on it as the server is. `sse` and `chunks` need the standard library only: `penstock chat`
starts without a web framework.
"""
