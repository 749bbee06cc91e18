"""What a configuration will cost, before it runs: memory, FLOPs, cache and pipeline bubble."""
