"""SwiGLU: silu(gate) * up, of the two halves of a row."""
