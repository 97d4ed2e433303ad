"""What requests cost, and what self-hosting is worth: over a ledger, and before there is one.

read (SQL) ─▶ report ─▶ patterns (what is wrong) · words (what it means) ─▶ records · page (HTML)
estimate, case_study: prices and tokens ─▶ tables
"""
