"""Hybrid and gated attention in Triton, for every GPU that Triton serves."""
