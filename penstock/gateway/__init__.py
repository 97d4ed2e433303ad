"""One governed door in front of many engines.

    client ─▶ who (keys) ─▶ where (routes) ─▶ may he (meter: reserve) ─▶ upstream ─▶ bytes back
                                                     └─▶ commit ─▶ a row in the ledger

`policy/` decides, in pure functions of state and `now`; the simulator imports it. Everything else here moves
bytes and writes rows. It knows no engine and no torch: an engine is a URL.
"""
