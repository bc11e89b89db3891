"""The statistics of a whole fleet of processors, from their metrics topics: a Faust application; see docs/stats.md."""
