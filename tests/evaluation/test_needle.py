"""Needles: where they are placed, what is scored, and that a window hides them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa.data.tokenizer import Tokenizer
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.needle import END, NAMES, PROMPT, Example, Needles, measure
from megaconsa.evaluation.record import NeedleSettings
from megaconsa.huggingface.load import load_exported
from tests.support.exports import make_export, one_layer

SETTINGS = NeedleSettings(lengths=[100, 140], depths=[0, 0.3, 1], needles=3, seed=0)


@pytest.fixture(scope="module")
def tokenizer(small_data: Path) -> Tokenizer:
    return Tokenizer.load(small_data / "tokenizer")


def split(
    example: Example, row: int, tokenizer: Tokenizer, answer: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Splits a row into its parts and checks that the needle and the question are in their places.

    answer: tokens of a number.
    Returns the haystack, the question, the number that the needle states, and the number in the
    answer.
    """
    ids = example.tokens[row].tolist()
    start = example.needle_start
    prompts = tokenizer.encode_batch([PROMPT.format(name) for name in NAMES])
    (prompt,) = (prompt for prompt in prompts if ids[start : start + len(prompt)] == prompt)
    (end,) = tokenizer.encode_batch([END])
    after = start + len(prompt) + answer + len(end)
    question = example.length - len(prompt) - answer
    assert ids[question:-answer] == prompt
    assert ids[after - len(end) : after] == end
    haystack = ids[:start] + ids[after:question]
    assert start == round(example.depth * len(haystack))
    return haystack, prompt, ids[after - len(end) - answer : after - len(end)], ids[-answer:]


def test_needles_lie_at_their_depth(
    needles: Needles, held_out: HeldOut, tokenizer: Tokenizer
) -> None:
    examples = list(needles.examples(SETTINGS))
    assert [(e.length, e.depth) for e in examples] == [
        (s, d) for s in (100, 140) for _ in range(3) for d in (0, 0.3, 1)
    ]
    starts = [held_out.text(index, 140).tolist() for index in range(len(held_out.starts))]
    for example in examples:
        assert example.tokens.shape == (2, example.length)
        right, wrong = (split(example, row, tokenizer, needles.answer_tokens) for row in (0, 1))
        assert right[0] in [start[: len(right[0])] for start in starts]
        assert right[2] == right[3]
        assert right[:2] == wrong[:2]
        assert wrong[3] == right[3]
        asked, other = (tokenizer.decode(number) for number in (right[2], wrong[2]))
        assert len(asked) == len(other) == len(" 12345")
        assert asked[0] == other[0] == " "
        assert all(a != b for a, b in zip(asked[1:], other[1:], strict=True))


def test_one_example_at_all_depths(needles: Needles, tokenizer: Tokenizer) -> None:
    examples = [
        split(example, 0, tokenizer, needles.answer_tokens)
        for example in needles.examples(SETTINGS)
    ]
    assert all(examples[i] == examples[i - i % 3] for i in range(len(examples)))
    assert all(
        examples[i] != examples[j] for i in range(0, len(examples), 3) for j in range(0, i, 3)
    )


def test_a_function_of_the_seed(held_out: HeldOut, tokenizer: Tokenizer) -> None:
    first, second, other = (
        list(Needles(tokenizer, held_out, seed).examples(SETTINGS)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["dense", "heads"])
def test_equals_a_pass_for_every_answer_token(
    name: str, loaded: Callable[[str], Any], needles: Needles
) -> None:
    settings = NeedleSettings(lengths=[100], depths=[0.5], needles=3, seed=0)
    (cell,) = measure(loaded(name), needles, settings, batch_tokens=450)
    truth = deepcopy(loaded(name)).double()
    pairs = []
    for example in needles.examples(settings):
        sums = [0.0, 0.0]
        for row, tokens in enumerate(example.tokens):
            for place in range(100 - needles.answer_tokens, 100):
                with torch.no_grad():
                    logits = truth(tokens[None, :place], use_cache=False).logits[0, -1]
                sums[row] += float(logits.log_softmax(0)[example.tokens[0, place]])
        pairs.append(sums)
    margins = [right - wrong for right, wrong in pairs]
    assert cell.log_probability == pytest.approx(
        statistics.mean(right for right, _ in pairs), rel=1e-5
    )
    assert cell.margin == pytest.approx(statistics.mean(margins), abs=1e-4)
    assert cell.margin_standard_error == pytest.approx(statistics.stdev(margins) / 3**0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("full", "window", "seen"), [(True, 8, True), (False, 8, False), (False, 90, True)]
)
def test_a_window_hides_the_needle_exactly(
    full: bool, window: int, seen: bool, needles: Needles, small_data: Path, tmp_path: Path
) -> None:
    """With one layer, no token further back than the window reaches the answer.

    A wider window sees only the later half.
    """
    allocation, shape = one_layer(full, window)
    model, _ = load_exported(
        make_export(tmp_path / "hf", allocation, small_data / "tokenizer", shape)
    )
    settings = NeedleSettings(lengths=[140], depths=[0, 0.25, 0.5, 1], needles=4, seed=0)
    cells = {cell.depth: cell for cell in measure(model, needles, settings, batch_tokens=2000)}
    assert (cells[1].margin != 0) == seen
    assert (cells[0].margin != 0) == full
    if not seen:
        assert all((cell.margin, cell.margin_standard_error) == (0, 0) for cell in cells.values())


def test_exact_match_is_what_greedy_decoding_gives(
    needles: Needles, small_data: Path, tmp_path: Path
) -> None:
    """The model has memorized the first examples and has never seen the others."""
    settings = NeedleSettings(lengths=[80], depths=[0, 1], needles=4, seed=0)
    examples = list(needles.examples(settings))
    learned = torch.stack([example.tokens[0] for example in examples[:4]])
    allocation, shape = one_layer(True)
    model, _ = load_exported(
        make_export(tmp_path / "hf", allocation, small_data / "tokenizer", shape)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = 80 - needles.answer_tokens
    for _ in range(60):
        logits = model(learned[:, :-1], use_cache=False).logits[:, first - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), learned[:, first:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cells = measure(model, needles, settings, batch_tokens=500)
    decoded = {0: 0, 1: 0}
    for example in examples:
        prompt = example.tokens[:1, :first]
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=needles.answer_tokens,
            do_sample=False,
            eos_token_id=-1,
        )
        decoded[int(example.depth)] += torch.equal(answer[0], example.tokens[0])
    assert {cell.depth: cell.exact_match for cell in cells} == {
        depth: count / 4 for depth, count in decoded.items()
    }
    assert 0 < sum(decoded.values()) < 8


def test_lengths(needles: Needles) -> None:
    assert needles.default_lengths(100 * needles.shortest) == [
        n * needles.shortest // 8 for n in (100, 200, 400, 800)
    ]
    assert needles.default_lengths(2 * needles.shortest) == [2 * needles.shortest]
    assert needles.default_lengths(needles.shortest) == []
