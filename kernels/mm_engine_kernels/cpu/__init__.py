"""C++ kernels for the CPU, one op a file; `extension` loads what they call."""
