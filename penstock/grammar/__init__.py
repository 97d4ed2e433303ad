"""What an output must match: from what a client asks for to masks over the vocabulary.

    StructuredOutputsParams ─ prepare ─▶ Grammar ─ source ─▶ the library's text ─ Compiler ─▶ Matcher per
    request (API process: cheap checks)          (travels)           (checked in a process of its own, then
    compiled
                                                              in the engine's, beside its steps)

The library behind it is llguidance: `compiler` alone calls it. No torch, no scheduler, no HTTP.
"""
