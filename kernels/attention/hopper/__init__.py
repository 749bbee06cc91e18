"""Hybrid and gated attention for Hopper, written in Gluon: 16-bit heads of 64 to 128."""
