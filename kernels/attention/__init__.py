"""Hybrid attention: the entry point, its backends, and the reference that all are compared with."""
