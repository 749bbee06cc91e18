"""Speed benchmarks beside other libraries. docs/benchmarks.md holds the results."""
