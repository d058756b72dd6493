"""LLaVA-NeXT for mm-engine."""
