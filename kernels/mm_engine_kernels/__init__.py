"""Kernels of mm-engine. `reference` says in plain PyTorch what each one computes."""
