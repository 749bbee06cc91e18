"""From text to batches: sources of documents, the tokenizer, packing, shards on disk (written, verified), and the batch stream."""

TOKENIZER = "tokenizer"
"""Folder of the tokenizer within a data folder, and within an imported checkpoint."""
