"""The contestants of `benchmarks.throughput` that need libraries of their own, each a module run in its environment."""
