"""The parts of `gpu.py`: what it measures, each section in a function of its own."""
