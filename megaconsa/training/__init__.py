"""The training loop: setting a run up, the step, and what happens around it (one concern a file in `callbacks/`)."""
