"""Options of the methods that score units.

This module imports nothing, so that the command line can read it without loading torch.
"""

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
"""Options of each method. Options that all methods have are not listed."""
