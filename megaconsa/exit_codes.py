"""What the exit code of a training process says. Job scripts decide by it whether to run the same command again (docs/resilience.md)."""

DONE = 0
"""The last step is done and saved, or a person asked for the stop by RUN/stop: nothing is to be run again."""
FAILED = 1
"""An error that the same command would meet again: damaged data, a last checkpoint that could not be written."""
REFUSED = 2
"""The input was refused, and nothing was written."""
STOPPED = 75
"""A signal or the end of the job's time stopped the run after it saved (EX_TEMPFAIL): the same command goes on from there."""
LOST = 76
"""A step did not end, a rank died without a word, storage or network did not answer for minutes, or two
saves in a row failed: the same command goes on from the newest checkpoint, on nodes that work."""
