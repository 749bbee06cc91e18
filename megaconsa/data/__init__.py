"""From text to batches: sources, tokenizer, packing, shards on disk, and the batch stream."""

TOKENIZER = "tokenizer"
"""Name of the tokenizer's folder within a data folder or an imported checkpoint."""
PIECES = "pieces"
"""Folder of tokenized pieces in a data folder that is being prepared."""
