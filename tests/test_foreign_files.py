"""Files from somebody else.

Whatever they contain, they are read or refused in one sentence, never with a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaconsa import config
from megaconsa.checkpoint import store
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.documents import read_documents
from megaconsa.data.megatron_file import MegatronFile
from megaconsa.data.sources import SourceFile, find_files
from megaconsa.errors import InputError
from megaconsa.evaluation.score_file import read_scores
from megaconsa.huggingface.source import open_source
from megaconsa.study import settings as study_settings

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "allocation": ("allocation.json", Allocation.load),
    "model": ("config.json", lambda file: open_source(file.parent)),
    "dataset": ("dataset.json", lambda file: DatasetInfo.load(file.parent)),
    "state": ("state.json", lambda file: store.read(file.parent)),
    "text": ("text.jsonl", lambda file: list(read_documents([SourceFile(file, "lines")]))),
    "parquet": ("x.parquet", lambda file: list(read_documents([SourceFile(file, "parquet")]))),
    "arrow": ("x.arrow", lambda file: list(read_documents([SourceFile(file, "arrow")]))),
    "source": ("source", lambda file: list(read_documents(find_files([str(file)]).files))),
    "megatron": ("x.idx", lambda file: MegatronFile(file, file)),
    "mds": ("index.json", lambda file: list(read_documents(find_files([str(file)]).files))),
    "scores": ("scores.json", lambda file: read_scores(file, Constraint(2, 2, 0.5))),
    "configuration": ("run.yaml", config.load),
    "study": ("study.yaml", study_settings.load),
}
NASTY = {
    "empty": b"",
    "deep": b"[" * 20_000 + b"]" * 20_000,
    "long integer": b'{"window": ' + b"1" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "half a pair": b'{"full": "\\ud800"}',
    "null": b"null",
    "list": b"[1, 2]",
    "NUL": b'{"a": "\x00"}',
    "infinite": b'{"window": 1e999, "num_layers": -Infinity}',
    "alias": b"a: &a [*a]",
    "tag": b"!!python/object/apply:os.system [echo]",
}

readers = pytest.mark.parametrize("reader", READERS)


@pytest.fixture(autouse=True)
def _no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECOND_LOOK_SECONDS", 0.0)


def read(reader: str, content: bytes, folder: Path) -> None:
    """Reads a file with the given content.

    Any exception except a refusal in one line is raised.
    """
    name, function = READERS[reader]
    file = folder / name
    file.write_bytes(content)
    refusal = ""
    try:
        function(file)
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert [path.name for path in folder.iterdir()] == [name]


@readers
@pytest.mark.parametrize("content", NASTY)
def test_nasty_contents(reader: str, content: str, tmp_path: Path) -> None:
    read(reader, NASTY[content], tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@readers
@given(
    content=st.binary(max_size=64) | VALUES.map(lambda value: repr(value).encode(errors="replace"))
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_content(reader: str, content: bytes, tmp_path: Path) -> None:
    read(reader, content, tmp_path)
