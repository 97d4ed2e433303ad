"""A fuzzer of the whole server: over a socket, against a real `penstock serve`, judged answer by answer.

    python -m tests.attack.fuzz --requests 1000000 --seed 1 --workers 2

    values ──▶ requests ──▶ cases ──▶ drive ──▶ oracle
    hostile    valid, by    mutated,  sockets   what is wrong with an answer, if anything
    JSON       endpoint     on a wire

A case is a function of (seed, number): what is found once is found again, alone. The protocol's Structs say
which fields there are and of which type, so a new field is fuzzed as soon as it exists.
"""
