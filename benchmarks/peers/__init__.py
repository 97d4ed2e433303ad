"""This engine and its peers, side by side: the same model files, loads and machine, alternating.

    python -m benchmarks.peers setup     make the peers' environments under .peers/ (skips what is there)
    python -m benchmarks.peers run       measure, write the JSON after every run, then report
    python -m benchmarks.peers report    draw table, plots and docs/performance.md from the JSON again

    loads    what is sent                     workers/  what runs inside a peer's own Python
    engines  who is measured, and how it      setup     makes the peers' environments
             is started                       results   the JSON file: append, resume, medians
    session  one live engine: start-up,       summary   numbers derived from it; Markdown
             loads, stop                      plots     pictures of it
    run      rounds of all of these           hardware  the limits of the machine, measured beside

Only one engine is alive at a time: two of them on the same cores ruin each other. Engines that speak HTTP are
measured by `penstock.bench`; libraries run in a worker process and hand back the same per-request times, so
every number of every engine comes out of the same arithmetic.

Nothing is imported here: the workers run under other Pythons, which have none of our dependencies.
"""
