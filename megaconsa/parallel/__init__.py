"""Parallelism around the model: process groups, pipeline layers, the DeepSpeed engine. The one folder but checkpoint/ that knows DeepSpeed."""
