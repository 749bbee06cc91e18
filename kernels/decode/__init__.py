"""Attention of one new token to a KV cache in which windowed heads hold only their window."""
