"""The chaos suite: a real cluster, three replicas, load, faults by a seed, and an oracle that compares the topics."""
