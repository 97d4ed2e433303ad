"""`/v1/files` and `/v1/batches`: uploads, and work that upstreams do later.

    form ─▶ lines ─▶ desk: a file, at an upstream, whose it is in objects
    batch: reserve ─▶ upstream ─▶ row `unsettled` ─▶ (a day later) settling: the row as it was used

An upstream has one list of files for all keys of the gateway; whose they are stands in the ledger's database.
"""
