"""Fuzzing: bytes to checks, a few seconds in every test run and as long as one likes with ``make fuzz``.

Each target is a pure function: it makes a case of the bytes (``take``), runs the real code on it and asserts what has
to hold. ``test_targets`` runs the targets under Hypothesis, always on the same inputs; ``run`` under atheris, guided by
coverage. What a run finds is a file of bytes, and becomes a named test beside the code at fault.
"""
