"""What can be seen of a running processor from outside: metrics, health, status over HTTP, logs.

Nothing here is imported by the package itself, so that a worker process that only logs does not load a web framework.
"""
