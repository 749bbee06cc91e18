"""Pretraining of Qwen3-like models with ConSA gates.

A first stage learns which KV heads keep full attention. A second stage trains on that allocation.
"""

__version__ = "0.1.0"
