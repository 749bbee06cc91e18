"""Checkpoints: folders of safetensors and JSON under canonical names, unsharded and in the model's original head order."""
