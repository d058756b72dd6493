"""From what a caller sends to token ids, placeholder ranges and tensors."""
