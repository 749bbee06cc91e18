"""Pretraining of Qwen3-like models with ConSA gates: learn which KV heads keep full attention, then train on that allocation."""

__version__ = "0.1.0"
