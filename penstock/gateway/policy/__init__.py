"""What the door decides: limits, routes, retries, health. Pure functions and machines of values and `now`.

No I/O, no clock, no randomness of its own (draws are arguments), no framework: the simulator runs this very
code under virtual time.
"""
