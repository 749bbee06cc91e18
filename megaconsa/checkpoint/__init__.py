"""Checkpoints: folders of safetensors and JSON.

Tensors have canonical names. They are unsharded and in the model's original head order.
"""
