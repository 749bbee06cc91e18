"""Parallelism around the model: process groups, pipeline layers, the DeepSpeed engine."""
