"""The exit codes of a training process.

Job scripts use them to decide whether to run the same command again (docs/resilience.md).
"""

DONE = 0
"""The last step is done and saved, or a person stopped the run by RUN/stop.

Nothing must be run again."""
FAILED = 1
"""An error that the same command would meet again.

Examples are damaged data and a last checkpoint that could not be written."""
REFUSED = 2
"""The input was refused, and nothing was written."""
STOPPED = 75
"""A signal or the end of the job's time stopped the run after it saved (EX_TEMPFAIL).

The same command resumes from there."""
LOST = 76
"""A failure after which the same command resumes from the newest checkpoint, on working nodes.

A step did not end, data did not come, a rank died without an error, storage or network did not
respond for minutes, or two saves in a row failed."""
