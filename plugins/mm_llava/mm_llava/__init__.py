"""LLaVA-1.5 for mm-engine."""
