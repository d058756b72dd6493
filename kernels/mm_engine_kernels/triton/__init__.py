"""The kernels in Triton, one op a file. Importing this package imports no Triton; its files do."""
