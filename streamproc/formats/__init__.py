"""Formats of values beside JSON, and the schema registry; imported by children of the processor, not by itself."""
