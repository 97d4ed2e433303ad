"""The right form of a request, for who has sent it with another method: a load generator's GET, mostly."""

from __future__ import annotations

import re

#: The least that each path takes, by its end.
_BODIES = {
    "/v1/completions": '{"model": "MODEL", "prompt": "Hello", "max_tokens": 16}',
    "/v1/chat/completions": (
        '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}'
    ),
    "/v1/chat/completions/batch": (
        '{"model": "MODEL", "messages": [[{"role": "user", "content": "Hello"}]], "max_tokens": 16}'
    ),
    "/v1/responses": '{"model": "MODEL", "input": "Hello", "max_output_tokens": 16}',
    "/v1/messages": (
        '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}'
    ),
    "/v1/embeddings": '{"model": "MODEL", "input": "Hello"}',
    "/v2/embed": '{"model": "MODEL", "texts": ["Hello"]}',
    "/pooling": '{"model": "MODEL", "input": "Hello"}',
    "/classify": '{"model": "MODEL", "input": "Hello"}',
    "/score": '{"model": "MODEL", "text_1": "Hello", "text_2": ["Hi", "Bye"]}',
    "/rerank": '{"model": "MODEL", "query": "Hello", "documents": ["Hi", "Bye"]}',
}
_HOST = re.compile(r"[A-Za-z0-9.\-]{1,200}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,60}\](?::[0-9]{1,5})?")
_PATH = re.compile(r"[A-Za-z0-9/_.\-]{1,200}")


def right_form(path: str, scheme: str, host: str) -> str:
    """A sentence with the command that works, or nothing for a path whose requests have no body.

    host: as the client has sent it; shown where it is one.
    """
    name = "/" + path.strip("/")
    end = next((each for each in _BODIES if name.endswith(each)), None)
    if end is None:
        return ""
    place = host if _HOST.fullmatch(host) else "HOST"
    shown = name if _PATH.fullmatch(name) else end
    where = f"{'https' if scheme == 'https' else 'http'}://{place}{shown}"
    return (
        f"It takes a POST with a JSON body: curl -X POST {where} -H 'Content-Type: application/json' "
        f"-d '{_BODIES[end]}' (GET /v1/models lists names for MODEL; with hey: -m POST -T application/json "
        "-d BODY)."
    )
