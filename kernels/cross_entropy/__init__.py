"""Cross-entropy of logits, whose memory becomes that of their gradient."""
