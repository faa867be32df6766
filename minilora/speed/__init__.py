"""Speed: read this last. Faster forms of what the layers do anyway.

With a file here switched off, values and gradients stay the same up to rounding; dropout keeps its
distribution and draws other masks.

gemm      float32 matrix products by oneDNN, where it is the faster library
"""
