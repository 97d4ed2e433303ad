"""Whether a candidate answers as well as a baseline, on a set of examples, before traffic moves to it.

    dataset ──▶ sides (servers, or engines that are started) ──▶ asking ──▶ answers, kept in the cache
                                                                   │
    report ◀── comparison: the verdict, from statistics ◀── graders, on what has been answered by both

Every example has one answer of each side, whatever is interrupted and begun again; answers are graded when
all are there, so that grading takes no time from what is measured. Knows OpenAI's HTTP and how an engine is
started; knows no engine from inside.
"""
