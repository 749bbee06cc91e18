"""The method: hard concrete gates, the constraint on sparsity, and the allocation they end in. Imports torch only."""
