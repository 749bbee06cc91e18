"""The Qwen3-like model and its arithmetic.

This package knows nothing of process groups, files or DeepSpeed.
"""
