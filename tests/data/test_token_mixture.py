"""Several data folders read as one stream: topologies, resumed steps, and bad mixture files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megaconsa.data.mixture_file import MixtureInfo, read_info
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_mixture import TokenMixture, open_sequences
from megaconsa.errors import InputError
from tests.data.conftest import make_documents

WriteMixture = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folders `one`, `two` and `three` of different sizes."""
    folder = tmp_path_factory.mktemp("mixture")
    for seed, (name, count) in enumerate({"one": 150, "two": 300, "three": 80}.items()):
        text = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": document}) for document in make_documents(count, 20 + seed)]
        text.write_text("\n".join(lines))
        options = Options(sequence_length=32, validation_share=0.2)
        prepare([str(text)], folder / name, options, tokenizer=tokenizer_folder)
    return folder


@pytest.fixture
def mixture(folders: Path, tmp_path: Path) -> WriteMixture:
    def write(content: str) -> Path:
        file = tmp_path / "mixture.yaml"
        for name in ("one", "two", "three"):
            link = tmp_path / name
            if not link.exists():
                link.symlink_to(folders / name)
        file.write_text(content)
        return file

    return write


ONE = "sources: {one: {path: one, weight: 1}}\n"
THREE = """
sources:
  one: {path: one, weight: 0.5}
  two: {path: two, weight: 0.3}
  three: {path: three, weight: 0.2}
phases:
  - {from_tokens: 9600, weights: {one: 1, three: 3}}
"""


def batches(
    file: Path,
    steps: int,
    *,
    taken: int = 0,
    ranks: int = 1,
    micro_batch: int = 2,
    workers: int = 0,
) -> torch.Tensor:
    """The tokens of the first steps, (steps, 16, S), put together from all ranks."""
    found = torch.zeros(steps, 16, 32, dtype=torch.int64)
    for rank in range(ranks):
        stream = BatchStream(
            file,
            seed=5,
            global_batch=16,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=ranks,
            workers=workers,
        )
        for step, micro_batches in zip(range(steps), stream.steps(taken), strict=False):
            for batch in micro_batches:
                found[step, batch.sequences] = batch.tokens
    return found


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "workers"), [(2, 4, 0), (4, 2, 0), (8, 1, 0), (8, 2, 0), (1, 16, 2)]
)
def test_every_topology_has_the_same_batches(
    ranks: int, micro_batch: int, workers: int, mixture: WriteMixture
) -> None:
    file = mixture(THREE)
    expected = batches(file, 30)
    found = batches(file, 30, ranks=ranks, micro_batch=micro_batch, workers=workers)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [1, 7, 18, 19, 20, 29])
def test_a_resumed_run_has_the_same_batches(step: int, mixture: WriteMixture) -> None:
    file = mixture(THREE)
    assert torch.equal(batches(file, 3, taken=16 * step), batches(file, 32)[step : step + 3])


def test_each_source_has_its_share_and_each_sequence_its_turn(mixture: WriteMixture) -> None:
    file = mixture(THREE)
    sequences = TokenMixture(file, "train")
    sizes = [info.splits["train"].sequences for info in MixtureInfo(file).infos.values()]
    assert len(sequences) == sum(sizes)
    begins = np.cumsum([0, *sizes])
    begin, places = 9600 // 32, 20_000
    ids = sequences.order(seed=5).ids(np.arange(places))
    for phase, shares in ((ids[:begin], (0.5, 0.3, 0.2)), (ids[begin:], (0.25, 0, 0.75))):
        counts = np.histogram(phase, begins)[0]
        expected = len(phase) * np.array(shares)
        # The last block of the second phase is not whole.
        assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected + 1))
    assert np.histogram(ids[:begin], begins)[0].tolist() == [150, 90, 60]
    for source, size in enumerate(sizes):
        mine = ids[(ids >= begins[source]) & (ids < begins[source + 1])] - begins[source]
        for epoch in range(len(mine) // size):
            passed = mine[epoch * size : (epoch + 1) * size]
            assert np.array_equal(np.sort(passed), np.arange(size))


def test_rows_and_files_are_those_of_the_sources(mixture: WriteMixture, folders: Path) -> None:
    file = mixture(THREE)
    sequences = open_sequences(file, "validation")
    ids = np.array([len(sequences) - 1, 0, 5, 0])
    rows = sequences.rows(ids)
    three = open_sequences(folders / "three", "validation")
    one = open_sequences(folders / "one", "validation")
    assert np.array_equal(rows[:1], three.rows(np.array([len(three) - 1])))
    assert np.array_equal(rows[1:], one.rows(np.array([0, 5, 0])))
    shard, row = sequences.locate(len(sequences) - 1)
    assert (shard.parent.parent.name, row) == ("three", len(three) - 1)
    sample = sequences.sample(10)
    assert len(np.unique(sample)) == 10
    assert sample.max() >= len(sequences) * 0.85


def test_repeats_are_passes(mixture: WriteMixture) -> None:
    file = mixture("sources: {one: {path: one, repeat: 1}, two: {path: two, repeat: 2.5}}")
    info = MixtureInfo(file)
    sizes = [each.splits["train"].sequences for each in info.infos.values()]
    expected = [sizes[0], 2.5 * sizes[1]]
    shares = [float(share) for share in info.phases[0].shares]
    assert shares == pytest.approx([each / sum(expected) for each in expected])


def test_the_description_changes_with_the_mixture(mixture: WriteMixture, folders: Path) -> None:
    one = read_info(mixture(THREE)).identity()
    assert one == read_info(mixture(THREE + "\n# a comment\n")).identity()
    assert one != read_info(mixture(THREE.replace("0.5", "0.6"))).identity()
    assert one != read_info(mixture(THREE.replace("9600", "9632"))).identity()
    assert one != read_info(mixture(THREE.replace("path: two", "path: one"))).identity()
    equal = "sources: {one: {path: one, weight: 1}, two: {path: two, weight: 1}}"
    turned = "sources: {two: {path: two, weight: 1}, one: {path: one, weight: 1}}"
    assert read_info(mixture(equal)).identity() != read_info(mixture(turned)).identity()
    # Only the data matter, not where they are.
    moved = THREE.replace("path: ", f"path: {folders}/")
    assert one == read_info(mixture(moved)).identity()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sources: [", "not YAML"),
        ("sources: {}", "sources: "),
        ("sources: {one: {path: one, weight: 1}, one: {path: two, weight: 1}}", "given twice"),
        (ONE + "phases: [{from_tokens: 99999999999999999999, weights: {one: 1}}]", "from_tokens"),
        ("sources: {one: {path: one}}", "give source one either a weight or a repeat"),
        ("sources: {one: {path: one, weight: 1, repeat: 1}}", "either a weight or a repeat"),
        ("sources: {one: {path: one, weight: 0}}", "all weights are 0"),
        ("sources: {one: {path: one, weight: -1}}", "sources.one.weight"),
        ("sources: {one: {path: one, weigth: 1}}", "sources.one.weigth"),
        ("sources: {'a b': {path: one, weight: 1}}", "a b"),
        ("sources: {one: {path: gone, weight: 1}}", "gone: no such folder"),
        (
            "sources: {one: {path: one, weight: 1}, two: {path: two, repeat: 1}}",
            "all sources a weight, or all a repeat",
        ),
        (
            ONE + "phases: [{from_tokens: 99, weights: {x: 1}}]",
            "x, which is no source",
        ),
        (
            ONE + "phases: [{from_tokens: 9, weights: {one: 1}}]",
            "from_tokens 9 does not come after",
        ),
    ],
)
def test_bad_mixtures_are_refused(content: str, said: str, mixture: WriteMixture) -> None:
    with pytest.raises(InputError) as error:
        MixtureInfo(mixture(content))
    assert said in str(error.value)
    assert "mixture.yaml" in str(error.value) or "gone" in str(error.value)


def test_sources_that_do_not_fit_together_are_refused(
    mixture: WriteMixture, folders: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    options = Options(sequence_length=16, validation_share=0)
    source = [str(folders / "one.jsonl")]
    prepare(source, tmp_path / "short", options, tokenizer=tokenizer_folder)
    prepare(source, tmp_path / "other", Options(sequence_length=32), train_tokenizer=600)
    for name, said in (("short", "sequence length 16"), ("other", "vocabulary 600")):
        content = f"sources: {{one: {{path: one, weight: 1}}, {name}: {{path: {name}, weight: 1}}}}"
        with pytest.raises(InputError, match=f"source {name} has the {said}"):
            MixtureInfo(mixture(content))
