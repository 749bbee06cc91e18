"""The Qwen3-like model and its arithmetic. Knows nothing of process groups, files or DeepSpeed."""
