"""Options of the methods that score units. Imports nothing, so that the command line can read it
without loading torch."""

SAMPLE = {"data", "batch", "seed"}
FROZEN = SAMPLE | {"sequences"}
TRAINED = SAMPLE | {"z", "steps", "learning_rate"}
OPTIONS = {
    "leave-one-out": FROZEN,
    "leave-one-in": FROZEN,
    "gradient": FROZEN | {"z"},
    "attention-mass": FROZEN,
    "calibrate": TRAINED,
    "scalar-gates": TRAINED | {"weight_learning_rate"},
    "file": {"scores"},
}
"""Which of the options that only some methods have belong to each."""
