"""A probe of /livez in a process of its own, so that nothing the attacker does delays it.

    python tests/attack/watch.py PORT    asks until standard input ends, then prints one line of JSON

Every probe comes on a new connection, as the kubelet's do. Standard library only: it has to start at once.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

PERIOD = 0.02
"""Seconds between the end of a probe and the next one."""
GIVE_UP = 30.0
"""Seconds after which a probe has failed."""


def probe(port: int) -> tuple[float, int]:
    """(seconds, status) of one probe; the status is 0 where there is no answer."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GIVE_UP)
    try:
        connection.request("GET", "/livez", headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
        status = answer.status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    return time.perf_counter() - begin, status


def main() -> None:
    """Probe until standard input ends."""
    port = int(sys.argv[1])
    worst, count, failed = 0.0, 0, 0
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], PERIOD if count else 0)[0]:
        seconds, status = probe(port)
        worst, count, failed = max(worst, seconds), count + 1, failed + (status != 200)
    print(json.dumps({"worst": worst, "count": count, "failed": failed}), flush=True)


if __name__ == "__main__":
    main()
