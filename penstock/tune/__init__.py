"""Finding the flags with which a running engine serves most requests within their targets.

    search      which setting to try next, from what was measured: pure
    diagnosis   whether requests waited or were computed too slowly: pure
    slo · run   targets, and what one run of load has measured
    load        one run: closed loop over HTTP, with the engine's metrics beside it
    engines     the engine between runs: started again by `penstock up` with other flags, or left as it is
    loop        these together, with repeats
    report      for people and as JSON

An engine is known by its URL and its metrics, vLLM as well as ours.
"""
