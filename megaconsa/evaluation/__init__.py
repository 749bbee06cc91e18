"""Evaluates a trained model or an export of it. Reads checkpoints and exported folders."""
