"""What happens around a training step, one concern a file. The trainer calls them in order; each may add fields to the step's row."""
