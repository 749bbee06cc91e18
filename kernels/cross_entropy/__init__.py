"""Cross-entropy of logits, which can overwrite the logits with their gradient."""
