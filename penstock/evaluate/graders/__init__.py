"""What an answer is worth, from 0 to 1.

spec     the graders by name and what each needs; read from a set or a flag
text     exact, normalised, includes, regex        pure functions of an answer and what was expected
values   numeric, JSON schema                      the same
worker   a process for them and for Python hooks: whatever hangs or grows there ends with it
judge    the question to a model as judge, and the reading of its verdict
desk     brings an answer to its grader
"""
