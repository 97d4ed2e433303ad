"""The one exception of the room: a measurement that cannot be made, and why."""


class BenchError(Exception):
    """Says what happened, which value, and what to do; the command line prints it as one line."""
