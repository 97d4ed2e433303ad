"""A canary: a route's requests move from its targets to one of them, step by step.

start ─▶ verdict of `penstock eval`? ─▶ 1 % ─hold, judge─▶ 5 % ─▶ … ─▶ 100 % ─▶ promoted
                                          └── fails more, or is slower ──▶ aborted: weights as before

judge     when to wait, go on or give up: pure
verdict   whether a candidate must have passed an evaluation first, and whether it has
state     the file that a rollout goes on from
admin     the gateway's admin API
run       all of them, in a loop
"""
