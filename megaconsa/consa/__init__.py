"""The method: hard concrete gates, the sparsity constraint, and the final allocation.

This package imports torch only.
"""
