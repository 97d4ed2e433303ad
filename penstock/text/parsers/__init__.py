"""Parsers of what models write beside plain text: thoughts and calls of tools."""
