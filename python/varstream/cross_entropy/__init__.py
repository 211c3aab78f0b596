"""The head on a GPU: matrix products by torch, everything between them in row kernels."""
