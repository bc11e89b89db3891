"""streamproc inside other people's applications: the pool, the batches and the isolation, without `streamproc run`."""
