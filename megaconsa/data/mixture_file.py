"""Mixture files: several data folders with weights, in place of a single data folder.

sources:
  web: {path: web_8192, weight: 0.7}
  code: {path: code_8192, weight: 0.3}
phases:
  - from_tokens: 80_000_000_000
    weights: {web: 0.3, code: 0.7}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import xxhash
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.dataset_info import TRAIN, DatasetInfo, SourceInfo, SplitInfo
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.mixture import Phase
from megaconsa.errors import InputError
from megaconsa.reading import patiently
from megaconsa.remote_path import is_remote, with_address
from megaconsa.strict_yaml import UniqueKeyLoader

SUFFIXES = (".yaml", ".yml")
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$")]
"""The name of a source. It becomes part of the names of metrics."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MixtureSource(_Strict):
    """One data folder of a mixture."""

    path: Path
    """A folder in an object store, or relative to the folder of the mixture file."""
    weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Its share of the tokens, relative to the other weights."""
    repeat: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Its weight in passes over the folder, relative to the other sources' passes."""


class MixturePhase(_Strict):
    """Other weights from some point of the training on."""

    from_tokens: int = Field(gt=0, lt=1 << 63)
    """Tokens of the stream before the phase."""
    weights: dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """Weight of each source. Sources that are not named give nothing."""


class MixtureFile(_Strict):
    """The content of a mixture file."""

    sources: dict[Name, MixtureSource] = Field(min_length=1)
    phases: list[MixturePhase] = []


def is_mixture(path: Path) -> bool:
    """Whether a data path is a mixture file rather than a data folder.

    A mixture file is on a disk. Its data folders may be in an object store.
    """
    if is_remote(path):
        return False
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


class MixtureInfo:
    """A mixture file and the descriptions of its data folders."""

    def __init__(self, file: Path, cache: CacheSettings = DEFAULT_CACHE) -> None:
        """Reads the file and each folder's dataset.json.

        cache: for data folders in an object store.

        Raises InputError where one is missing, or where the folders do not fit together.
        """
        self.file = file
        content = _read(file)
        self.folders: dict[str, Path] = {}
        """The data folder of each source."""
        self.infos: dict[str, DatasetInfo] = {}
        for name, source in content.sources.items():
            folder = with_address(source.path)
            if not is_remote(folder):
                folder = file.parent / folder.expanduser()
            self.folders[name] = folder
            self.infos[name] = DatasetInfo.load(folder, cache)
        self._check_folders()
        first = next(iter(self.infos.values()))
        self.phases = _phases(file, content, self.infos, first.sequence_length)

    def _check_folders(self) -> None:
        """Raises InputError where a folder has other sequences than the first one."""
        for name, info in self.infos.items():
            if info.compressed:
                raise InputError(
                    f"{self.file}: source {name} is a folder of version 1, prepare it again"
                )
        (first_name, first), *others = self.infos.items()
        for name, info in others:
            pairs: dict[str, tuple[object, object]] = {
                "sequence length": (first.sequence_length, info.sequence_length),
                "vocabulary": (first.vocab_size, info.vocab_size),
                "end-of-text token": (first.end_of_text, info.end_of_text),
            }
            if not same_tokenizer(first.tokenizer_fingerprint, info.tokenizer_fingerprint):
                pairs["tokenizer"] = (first.tokenizer_fingerprint, info.tokenizer_fingerprint)
            for what, (mine, theirs) in pairs.items():
                if mine != theirs:
                    raise InputError(
                        f"{self.file}: source {name} has the {what} {theirs} but {first_name} has "
                        f"{mine}, prepare both alike"
                    )

    def combined(self) -> DatasetInfo:
        """One description of all sources. It changes with their data, weights and phases."""
        first = next(iter(self.infos.values()))
        splits = {}
        for split in first.splits:
            parts = [info.splits[split] for info in self.infos.values() if split in info.splits]
            splits[split] = SplitInfo(
                sequences=sum(part.sequences for part in parts),
                tokens=sum(part.tokens for part in parts),
                documents=sum(part.documents for part in parts),
            )
        sources = [info.source for info in self.infos.values()]
        phases = [[phase.begin, *map(str, phase.shares)] for phase in self.phases]
        # The order of the sources matters too.
        content = [[name, info.identity()] for name, info in self.infos.items()]
        identity = json.dumps([content, phases], sort_keys=True)
        return DatasetInfo(
            vocab_size=first.vocab_size,
            tokenizer_fingerprint=first.tokenizer_fingerprint,
            end_of_text=first.end_of_text,
            sequence_length=first.sequence_length,
            unigram_entropy=None,
            loss_mask=any(info.loss_mask for info in self.infos.values()),
            splits=splits,
            source=SourceInfo(
                names=[str(self.file)],
                digest=xxhash.xxh3_128_hexdigest(identity.encode()),
                documents=sum(source.documents for source in sources),
                characters=sum(source.characters for source in sources),
                validation_share=first.source.validation_share,
                trained_vocabulary=None,
            ),
        )


def read_info(path: Path, cache: CacheSettings = DEFAULT_CACHE) -> DatasetInfo:
    """The description of a data folder or of a mixture.

    cache: for data folders in an object store.

    Raises InputError where it is none.
    """
    path = Path(path)
    if is_mixture(path):
        return MixtureInfo(path, cache).combined()
    return DatasetInfo.load(path, cache)


def data_folders(path: Path, cache: CacheSettings = DEFAULT_CACHE) -> list[Path]:
    """The data folders of a data path: itself, or those of a mixture."""
    path = Path(path)
    if is_mixture(path):
        return list(MixtureInfo(path, cache).folders.values())
    return [with_address(path)]


def tokenizer_folder(path: Path) -> Path:
    """The tokenizer of a data folder or of a mixture, on a disk."""
    # Reading a mixture needs no transformers.
    from megaconsa.data.tokenizer_folder import local_tokenizer

    return local_tokenizer(data_folders(path)[0])


def _read(file: Path) -> MixtureFile:
    """The content of a mixture file. Raises InputError where it is none."""
    try:
        content = patiently(file.read_bytes, file)
        return MixtureFile.model_validate(yaml.load(content, UniqueKeyLoader))
    except OSError as error:
        raise InputError(f"data {file}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"data {file}: not YAML ({reason})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"data {file}: {field}: {first['msg']}") from error


def _phases(
    file: Path, content: MixtureFile, infos: Mapping[str, DatasetInfo], sequence_length: int
) -> list[Phase]:
    """The phases, of which the first begins at 0. Raises InputError where they contradict."""
    phases = [Phase(0, _first_shares(file, content, infos))]
    for phase in content.phases:
        if unknown := set(phase.weights) - set(content.sources):
            raise InputError(
                f"data {file}: a phase gives a weight to {min(unknown)}, which is no source"
            )
        begin = phase.from_tokens // sequence_length
        if begin <= phases[-1].begin:
            raise InputError(
                f"data {file}: from_tokens {phase.from_tokens} does not come after the phase before"
            )
        weights = [phase.weights.get(name, 0.0) for name in content.sources]
        phases.append(Phase(begin, _shares(file, weights)))
    return phases


def _first_shares(
    file: Path, content: MixtureFile, infos: Mapping[str, DatasetInfo]
) -> tuple[Fraction, ...]:
    """The shares that the sources themselves give."""
    weights: list[float | Fraction] = []
    for name, source in content.sources.items():
        if (source.weight is None) == (source.repeat is None):
            raise InputError(f"data {file}: give source {name} either a weight or a repeat")
        if source.weight is not None:
            weights.append(source.weight)
        else:
            sequences = infos[name].splits[TRAIN].sequences
            weights.append(Fraction(str(source.repeat)) * sequences)
    if len({source.weight is None for source in content.sources.values()}) > 1:
        raise InputError(f"data {file}: give all sources a weight, or all a repeat")
    return _shares(file, weights)


def _shares(file: Path, weights: list[float | Fraction] | list[float]) -> tuple[Fraction, ...]:
    """The weights, scaled so that their sum is 1."""
    # The decimal form is what the user wrote. The binary one has other digits.
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    if not total:
        raise InputError(f"data {file}: all weights are 0, give a source more")
    return tuple(weight / total for weight in exact)
