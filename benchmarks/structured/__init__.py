"""Structured outputs: are all outputs valid (valid), what do masks cost (libraries, throughput)."""
