"""Score files that are read, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megaconsa.consa.constraint import Constraint
from megaconsa.errors import InputError
from megaconsa.evaluation.score_file import read_scores

UNITS = Constraint(num_layers=2, num_kv_heads=4, sparsity=0.0, scope="global")
PATTERN = np.array([[-9.58e-05, 1.0, 0.55859375, 0.2], [0.98828125, 0.5, 1e-4, 0.734375]])


def test_duo_attention_pattern(tmp_path: Path) -> None:
    """The file is written with NumPy, as DuoAttention writes it.

    Its values may lie slightly outside [0, 1].
    """
    path = tmp_path / "full_attention_heads.tsv"
    np.savetxt(path, PATTERN, delimiter="\t")
    assert read_scores(path, UNITS).tolist() == PATTERN.tolist()


@pytest.mark.parametrize("content", [PATTERN.tolist(), {"scores": PATTERN.tolist(), "seed": 0}])
def test_json(content: object, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    assert read_scores(path, UNITS).tolist() == PATTERN.tolist()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("1\t2\t3\t4\n", "holds scores of shape 1 x 4, but the model has 2 x 4 units"),
        ("1\t2\t3\t4\n\n1\t2\t3\n", "line 3 holds 3 scores, but a layer of the model has 4 units"),
        ("1\t2\t3\t4\n1\tnan\t3\t4\n", "line 2 holds 'nan', which is not a finite number"),
        ("1\t2\t3\t4\n1\t2\tfull\t4\n", "line 2 holds 'full', which is not a finite number"),
        ("[[1, 2, 3, 4], [1, 2, 3]]", "layer 1 holds 3 scores"),
        ("[[1, 2, 3, 4], [1, 2, 3, NaN]]", "layer 1 holds nan, which is not a finite number"),
        ("[[1, 2, 3, 4], [1, 2, 3, true]]", "layer 1 holds True, which is not a finite number"),
        ("[[1, 2, 3, 4], [1, 2, 3, null]]", "layer 1 holds None, which is not a finite number"),
        ("[[1, 2, 3, 4], 5]", "layer 1 is 5, which is not a list of scores"),
        ('{"score": [[1, 2, 3, 4]]}', "has no list of lists"),
        ("[[1, 2,\n", "is not JSON: .* line 2"),
    ],
)
def test_files_that_are_no_scores(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "scores"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as refusal:
        read_scores(path, UNITS)
    assert str(path) in str(refusal.value)
