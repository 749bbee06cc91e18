"""The same kernels written for Hopper in Gluon: 16-bit heads of 64 to 128."""
