"""The whole run configuration, and what the rest of the package derives from it."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any

from megaconsa.config.sections import (
    AllocationSection,
    AttentionSection,
    BadStepsSection,
    CheckpointSection,
    DataSection,
    GatesSection,
    LoggingSection,
    ModelSection,
    ParallelSection,
    RunSection,
    Section,
    TrainingSection,
    ValidationSection,
    WatchdogSection,
)
from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gate_settings import GateSettings
from megaconsa.model.config import PRESETS, ModelConfig


class Config(Section):
    run: RunSection
    model: ModelSection = ModelSection()
    attention: AttentionSection
    allocation: AllocationSection
    gates: GatesSection = GatesSection()
    parallel: ParallelSection = ParallelSection()
    training: TrainingSection
    data: DataSection
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    bad_steps: BadStepsSection = BadStepsSection()
    watchdog: WatchdogSection = WatchdogSection()
    logging: LoggingSection = LoggingSection()

    @property
    def learning(self) -> bool:
        """Whether this run learns its allocation (stage 1)."""
        return self.allocation.source == "learn"

    @property
    def model_name(self) -> str:
        """The preset, or the origin of weights with more or wider layers than the preset."""
        preset = PRESETS[self.model.preset]
        model_config = self.to_model_config()
        sizes = (model_config.num_hidden_layers, model_config.hidden_size)
        is_preset = sizes == (preset.num_hidden_layers, preset.hidden_size)
        if is_preset or self.model.init_from is None:
            return self.model.preset
        return str(self.model.init_from)

    def to_model_config(self) -> ModelConfig:
        """The preset with the overrides of the section `model` applied."""
        overrides = {}
        for field in dataclass_fields(ModelConfig):
            value = getattr(self.model, field.name)
            if value is not None:
                overrides[field.name] = value
        return replace(PRESETS[self.model.preset], **overrides)

    def constraint(self) -> Constraint:
        """The target of learning, or of a rule that takes a sparsity.

        Raises InputError if it cannot be met.
        """
        section = self.allocation
        model_config = self.to_model_config()
        granularity = section.granularity
        scope = section.scope
        floor = section.floor
        if section.source == "rule" and section.rule in rules.OWN_UNITS:
            # Some rules fix their own granularity and scope.
            granularity, scope = rules.OWN_UNITS[section.rule]
            floor = 0
        return Constraint(
            num_layers=model_config.num_hidden_layers,
            num_kv_heads=model_config.num_key_value_heads,
            sparsity=section.sparsity,
            granularity=granularity,
            scope=scope,
            floor=floor,
        )

    def fixed_allocation(self) -> Allocation | None:
        """The finished allocation table that the configuration names. None while learning.

        Raises InputError if the table cannot be made or read, or does not have the model's shape.
        """
        section = self.allocation
        if section.source == "learn":
            return None
        model_config = self.to_model_config()
        layers = model_config.num_hidden_layers
        kv_heads = model_config.num_key_value_heads
        if section.source == "rule":
            seed = section.seed
            if seed is None and section.rule == "random":
                seed = self.run.seed
            return rules.build(
                section.rule,
                layers,
                kv_heads,
                self.attention.window,
                sparsity=section.sparsity,
                granularity=section.granularity,
                scope=section.scope,
                floor=section.floor,
                ratio=section.ratio,
                seed=seed,
            )
        assert section.file is not None
        allocation = Allocation.load(section.file)
        allocation.check_shape(layers, kv_heads, f"allocation.file={section.file}")
        return allocation

    def gate_settings(self) -> GateSettings:
        """The settings that the gate bank is built from.

        Raises InputError if the target cannot be met.
        """
        return GateSettings(
            constraint=self.constraint(),
            window=self.attention.window,
            controller=self.gates.controller,
            warmup_steps=self.gates.warmup_steps,
            learning_rate=self.gates.learning_rate,
            initial=self.gates.initial,
            seed=self.run.seed,
            global_batch=self.training.global_batch,
            steps=self.training.steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a run's config.yaml."""
        return self.model_dump(mode="json")
