"""Requests through time: the spine, the scheduler, its caches, and the engine's own process."""
