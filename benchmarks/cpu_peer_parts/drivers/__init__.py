"""Scripts that are run by each engine's own python: they import nothing of ours but each other."""
