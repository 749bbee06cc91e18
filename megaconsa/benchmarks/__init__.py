"""What measures speed, beside the peers. The results stand in docs/benchmarks.md."""
