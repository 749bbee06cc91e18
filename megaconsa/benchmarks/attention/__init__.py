"""`megaconsa bench-attention`: checks backends and peers against fp64, then times them in turns.

A peer is another library's attention.
"""
