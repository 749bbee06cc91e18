"""The training loop: set-up, the step, and one file in `callbacks/` per concern around the step."""
