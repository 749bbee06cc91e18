"""Rebuilds the gate bank of a learning run from its checkpoint, for tools that read it."""

from __future__ import annotations

from megaconsa import config as configuration
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.gates import GateBank
from megaconsa.errors import InputError


def read_gates(checkpoint: Checkpoint) -> GateBank:
    """Returns the gates as they were at the checkpoint's step.

    Raises InputError if the run did not learn an allocation.
    """
    if checkpoint.imported:
        raise InputError(
            f"{checkpoint.path} was imported and has learned no allocation; "
            f"train with model.init_from={checkpoint.path} first"
        )
    state = checkpoint.gates()
    settings = checkpoint.state["config"]
    if state is None:
        source = settings["allocation"]["source"]
        raise InputError(
            f"{checkpoint.path} did not learn an allocation: "
            f"its configuration has allocation.source={source}"
        )
    bank = GateBank(configuration.build(settings).gate_settings())
    bank.load_state(state)
    if checkpoint.step:
        # Gates are a function of step and evidence. Without a draw, the bank would still hold the
        # gates from before the first step.
        last = checkpoint.step - 1
        bank.gates.draw(last, bank.settings.target(last), 1)
    return bank
