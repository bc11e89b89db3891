"""The digits application: what ``streamproc demo`` runs and ``examples/digits`` describes.

It is in the package, and not in the example's folder, so that the demo works from a wheel and there is one copy of it.
Nothing else in streamproc imports it.
"""
