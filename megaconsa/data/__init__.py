"""From text to batches: sources of documents, the tokenizer, packing, shards on disk (written, verified), and the batch stream."""
