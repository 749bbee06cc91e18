"""Commented configurations: the quickstart, one GPU, and the paper's settings."""
