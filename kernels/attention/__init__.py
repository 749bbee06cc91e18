"""Hybrid attention: the entry, the backends that it chooses from, and the reference that all of them are compared with."""
