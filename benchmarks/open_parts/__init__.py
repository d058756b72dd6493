"""The parts of open.py."""
