"""What happens around a training step, one concern per file.

The trainer calls the callbacks in order. Each may add fields to the step's row.
"""
