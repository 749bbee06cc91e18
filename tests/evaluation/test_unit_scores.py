"""Every scoring method, compared with a slower reference.

The references are whole models, finite differences, and an explicit softmax.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaconsa.checkpoint import imported, store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.consa.constraint import Granularity
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.stream import Batch, BatchStream
from megaconsa.errors import InputError
from megaconsa.evaluation.unit_scores import Method, ScoreRequest, UnitScores, score_units
from megaconsa.huggingface.parameter_names import parameter_shapes
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.rotary.rotary import rotate
from megaconsa.model.config import ModelConfig
from megaconsa.model.qwen3 import Qwen3
from megaconsa.model.rope import rotary_angles
from tests.support.exports import SHAPE as FOUR_LAYERS
from tests.support.transformers_reference import random_weights

SHAPE = replace(FOUR_LAYERS, num_hidden_layers=2)
HEADS = SHAPE.num_key_value_heads
WINDOW = 8
SEQUENCES = 4
BATCH = 2
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)

Score = Callable[..., UnitScores]
both_granularities = pytest.mark.parametrize("granularity", ["kv_head", "layer"])


def write_import(
    out: Path, model_config: ModelConfig, fingerprint: str | None = None
) -> Checkpoint:
    """Writes a checkpoint of random weights as import-hf does."""
    weights = random_weights(model_config)
    imported.write(
        out,
        model_config,
        torch.float32,
        parameter_shapes(model_config),
        weights.__getitem__,
        allocation=None,
        fingerprint=fingerprint,
        origin={"folder": str(out)},
        add_files=lambda folder: None,
        advance=lambda count: None,
    )
    return store.resolve(out)


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of short documents. Most sequences hold several."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "paragraphs.jsonl"
    documents = Path(argparse.__file__).read_text().split("\n\n")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    data = folder / "data"
    prepare(
        [str(source)], data, Options(sequence_length=64, validation_share=0.1), train_tokenizer=512
    )
    return data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_import(tmp_path_factory.mktemp("imports") / "model", SHAPE)


@pytest.fixture
def score(checkpoint: Checkpoint, paragraphs: Path) -> Score:
    """Scores the checkpoint on four training sequences, two at a time."""

    def run(method: Method, **fields: object) -> UnitScores:
        settings: dict[str, Any] = {
            "device": CPU,
            "window": WINDOW,
            "data": paragraphs,
            "sequences": SEQUENCES,
            "batch": BATCH,
            **fields,
        }
        return score_units(checkpoint, ScoreRequest(method, **settings))

    return run


@pytest.fixture(scope="module")
def batch(paragraphs: Path) -> Batch:
    """The same four sequences as one batch."""
    stream = BatchStream(paragraphs, seed=0, global_batch=SEQUENCES, micro_batch=SEQUENCES)
    (found,) = next(stream.steps())
    assert bool((found.documents > 0).any())
    return found


class Heads:
    """Gives every head a stated window or a stated gate."""

    def __init__(self, full: Tensor | None = None, gates: Tensor | None = None) -> None:
        self.full = full
        self.gates = gates

    def select(self, layer: int, sequences: Tensor) -> HeadPattern:
        if self.gates is not None:
            return HeadPattern(WINDOW, self.gates[layer])
        assert self.full is not None
        full_heads = self.full[layer].tolist()
        return HeadPattern(tuple(FULL_WINDOW if full else WINDOW for full in full_heads))


def build(heads: Heads) -> Qwen3:
    model = Qwen3(SHAPE, heads, "reference")
    model.load_state_dict(random_weights(SHAPE), strict=not SHAPE.tie_word_embeddings)
    return model


@torch.no_grad()
def brute_force_losses(heads: Heads, batch: Batch) -> Tensor:
    """Nats per token.

    They are computed from the logits of a whole model with the reference attention.
    """
    logits = build(heads)(batch.tokens, batch.documents).double()
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def brute_force_rises(base: bool, granularity: Granularity, batch: Batch) -> Tensor:
    """The rise of the loss when one unit alone differs from the base.

    base: True if all units are full.
    Returns (layers, units).
    """
    whole = torch.full((SHAPE.num_hidden_layers, HEADS), base)
    columns = HEADS if granularity == "kv_head" else 1
    rises = torch.zeros(SHAPE.num_hidden_layers, columns, dtype=torch.float64)
    unchanged = brute_force_losses(Heads(whole), batch)
    for layer in range(SHAPE.num_hidden_layers):
        for unit in range(columns):
            changed = whole.clone()
            changed[layer, unit if granularity == "kv_head" else slice(None)] = not base
            rises[layer, unit] = brute_force_losses(Heads(changed), batch) - unchanged
    return rises


@both_granularities
def test_leave_one_out_is_brute_force(granularity: Granularity, score: Score, batch: Batch) -> None:
    scored = score("leave-one-out", granularity=granularity)
    expected = brute_force_rises(True, granularity, batch)
    assert expected.abs().min() > 1e-5
    torch.testing.assert_close(scored.scores, expected, rtol=1e-3, atol=2e-6)


@both_granularities
def test_leave_one_in_is_brute_force(granularity: Granularity, score: Score, batch: Batch) -> None:
    scored = score("leave-one-in", granularity=granularity)
    expected = -brute_force_rises(False, granularity, batch)
    torch.testing.assert_close(scored.scores, expected, rtol=1e-3, atol=2e-6)


@both_granularities
@pytest.mark.parametrize("z", [0.5, 0.9])
def test_gradient_is_the_finite_difference(
    granularity: Granularity,
    z: float,
    score: Score,
    batch: Batch,
) -> None:
    scored = score("gradient", granularity=granularity, z=z)
    step = 0.005
    for layer, unit in ((0, 0), (1, scored.scores.shape[1] - 1)):
        losses = []
        for change in (step, -step):
            gates = torch.full((SHAPE.num_hidden_layers, HEADS), z)
            gates[layer, unit if granularity == "kv_head" else slice(None)] += change
            losses.append(brute_force_losses(Heads(gates=gates), batch))
        expected = float(losses[1] - losses[0]) / (2 * step)
        assert float(scored.scores[layer, unit]) == pytest.approx(expected, rel=5e-3, abs=1e-4)


@both_granularities
def test_attention_mass_is_an_explicit_softmax(
    granularity: Granularity,
    score: Score,
    batch: Batch,
) -> None:
    """Hooks on the norms of the whole model record queries and keys."""
    model = build(Heads(torch.ones(SHAPE.num_hidden_layers, HEADS, dtype=torch.bool)))
    caught: dict[torch.nn.Module, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.register_forward_hook(lambda norm, _, output: caught.update({norm: output}))
    length = batch.tokens.shape[1]
    with torch.no_grad():
        model(batch.tokens, batch.documents)
    positions = torch.arange(length) - batch.documents
    cos, sin = rotary_angles(positions, SHAPE.head_dim, SHAPE.rope_theta)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    same = batch.documents[:, :, None] == batch.documents[:, None, :]
    beyond = positions >= WINDOW
    expected = torch.zeros(SHAPE.num_hidden_layers, HEADS, dtype=torch.float64)
    for layer in range(SHAPE.num_hidden_layers):
        place = f"model.layers.{layer}.self_attn"
        q = rotate(caught[model.get_submodule(f"{place}.q_norm")], cos, sin)
        k = rotate(caught[model.get_submodule(f"{place}.k_norm")], cos, sin)
        k = k.repeat_interleave(SHAPE.queries_per_kv_head, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / SHAPE.head_dim**0.5
        visible = (same & (distance >= 0))[:, None]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        outside = (weights * (distance >= WINDOW)).sum(dim=-1)
        by_query = outside.transpose(1, 2)[beyond]
        expected[layer] = by_query.double().mean(dim=0).unflatten(0, (HEADS, -1)).mean(dim=1)
    if granularity == "layer":
        expected = expected.mean(dim=1, keepdim=True)
    scored = score("attention-mass", granularity=granularity)
    assert expected.min() > 0.01
    torch.testing.assert_close(scored.scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["leave-one-out", "leave-one-in", "gradient", "attention-mass"])
def test_frozen_methods_do_not_depend_on_the_batch(method: Method, score: Score) -> None:
    small = score(method, batch=1)
    large = score(method, batch=2)
    torch.testing.assert_close(small.scores, large.scores, rtol=1e-3, atol=2e-6)
    assert small.standard_errors is not None
    assert large.standard_errors is not None
    torch.testing.assert_close(small.standard_errors, large.standard_errors, rtol=1e-2, atol=2e-6)
    assert bool((small.standard_errors > 0).all())


def test_another_seed_takes_other_sequences(score: Score) -> None:
    assert not torch.equal(score("gradient").scores, score("gradient", seed=1).scores)
    assert torch.equal(score("gradient").scores, score("gradient").scores)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


TRAINING = {"steps": 4, "learning_rate": 0.1, "sequences": 64}


@both_granularities
@pytest.mark.parametrize("method", ["calibrate", "scalar-gates"])
def test_trained_gates(
    method: Method,
    granularity: Granularity,
    score: Score,
    checkpoint: Checkpoint,
) -> None:
    before = digests(checkpoint.path)
    settings = {**TRAINING, "granularity": granularity, "weight_learning_rate": 1e-3}
    scored = score(method, **settings)
    again = score(method, **settings)
    other = score(method, **settings, seed=1)
    assert scored.scores.shape == (SHAPE.num_hidden_layers, 1 if granularity == "layer" else HEADS)
    assert torch.equal(scored.scores, again.scores)
    assert not torch.equal(scored.scores, other.scores)
    assert bool(((scored.scores > 0) & (scored.scores < 1) & (scored.scores != 0.5)).all())
    assert scored.standard_errors is None
    assert scored.origin["sequences"] == 4 * BATCH
    assert digests(checkpoint.path) == before


def test_first_step_of_the_gates_follows_the_gradient(score: Score) -> None:
    """Adam's first step moves each logit by the learning rate, towards the lower loss."""
    gradient = score("gradient", sequences=2, batch=1).scores
    gates = score("calibrate", steps=1, batch=2, learning_rate=0.1).scores
    torch.testing.assert_close(gates.logit(), 0.1 * gradient.sign(), rtol=1e-3, atol=1e-4)


def test_weights_of_scalar_gates_learn(score: Score) -> None:
    """The same steps with another learning rate for the weights give other gates."""
    frozen = score("calibrate", **TRAINING).scores
    slow = score("scalar-gates", **TRAINING, weight_learning_rate=1e-12).scores
    fast = score("scalar-gates", **TRAINING, weight_learning_rate=1e-2).scores
    torch.testing.assert_close(slow, frozen, rtol=1e-4, atol=1e-5)
    assert (fast - frozen).abs().max() > 1e-3


def test_origin_and_json(score: Score, checkpoint: Checkpoint, tmp_path: Path) -> None:
    scored = score("gradient")
    origin = {"method": "gradient", "run": str(checkpoint.path), "step": 0, "tokens": 0}
    assert scored.origin == {**origin, "sequences": SEQUENCES, "seed": 0}
    written = json.loads(json.dumps(scored.to_json()))
    assert written["scores"] == scored.scores.tolist()
    assert scored.standard_errors is not None
    assert written["standard_errors"] == scored.standard_errors.tolist()
    assert (written["window"], written["granularity"]) == (WINDOW, "kv_head")

    path = tmp_path / "scores.json"
    path.write_text(json.dumps(written))
    again = score("file", scores=path)
    assert torch.equal(again.scores, scored.scores)
    assert again.standard_errors is None
    assert again.origin == {**origin, "method": "file", "scores": str(path)}


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("gradient", {"sequences": 3}, "--sequences 3: too few sequences for evidence"),
        ("leave-one-out", {"sequences": 5}, "--sequences 5 is not a multiple of the batch of 2"),
        ("gradient", {"sequences": 10**6}, "--sequences 1000000: .* has only"),
        ("gradient", {"z": 1.0}, "--z 1 must lie between 0 and 1, both excluded"),
        ("calibrate", {"z": 0.0}, "--z 0 must lie between 0 and 1, both excluded"),
        ("gradient", {"window": 64}, "--window 64 hides nothing in sequences of 64 tokens"),
        ("gradient", {"window": None}, "was imported and has no window; give --window"),
        ("gradient", {"data": None}, "was imported and has no data; give --data FOLDER"),
        ("gradient", {"data": Path("/nowhere")}, "data /nowhere: no such folder"),
        ("scalar-gates", {}, "was imported and has no learning rate; give --weight-learning-rate"),
        ("file", {}, "--method file needs --scores FILE"),
        ("file", {"scores": Path("/nowhere")}, "--scores /nowhere cannot be read"),
    ],
)
def test_refusals(method: Method, fields: dict[str, object], said: str, score: Score) -> None:
    with pytest.raises(InputError, match=said):
        score(method, **fields)


@pytest.mark.parametrize(
    ("model_config", "fingerprint", "said"),
    [
        (replace(SHAPE, vocab_size=511), None, "has 512 token ids, but the model 511"),
        (replace(SHAPE, max_position_embeddings=63), None, "but the model has 63 positions"),
        (SHAPE, "another", "was trained with another; give the data it was trained on"),
    ],
)
def test_data_of_another_model(
    model_config: ModelConfig,
    fingerprint: str | None,
    said: str,
    paragraphs: Path,
    tmp_path: Path,
) -> None:
    checkpoint = write_import(tmp_path / "model", model_config, fingerprint)
    request = ScoreRequest("gradient", CPU, window=WINDOW, data=paragraphs)
    with pytest.raises(InputError, match=said):
        score_units(checkpoint, request)


@pytest.mark.gpu
@both_granularities
@pytest.mark.parametrize("method", ["leave-one-out", "leave-one-in", "gradient", "attention-mass"])
def test_gpu_agrees_with_cpu(method: Method, granularity: Granularity, score: Score) -> None:
    """Compares bf16 kernels with fp32.

    A wrong head, window or sequence would change the scores far more than the precision does.
    """
    settings = {"granularity": granularity, "sequences": 32}
    on_cpu = score(method, **settings).scores.flatten()
    on_gpu = score(method, **settings, device=GPU).scores.flatten()
    assert float((on_cpu - on_gpu).abs().max()) < 0.1 * float(on_cpu.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["calibrate", "scalar-gates"])
def test_trained_gates_on_a_gpu(method: Method, score: Score) -> None:
    settings: dict[str, Any] = {**TRAINING, "weight_learning_rate": 1e-4}
    on_cpu = score(method, **settings).scores
    on_gpu = score(method, **settings, device=GPU).scores
    assert on_gpu.device.type == "cpu"
    # Adam's first steps follow the sign of the gradient. bf16 may flip the sign of a small one.
    assert float(((on_cpu > 0.5) == (on_gpu > 0.5)).double().mean()) > 0.7
