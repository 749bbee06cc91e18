"""Arguments that hybrid attention refuses."""

from __future__ import annotations

import pytest
import torch

from megaconsa.kernels import hybrid_attention


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        ({"k": (2, 8, 3, 4), "v": (2, 8, 3, 4)}, {}, "shapes do not fit"),
        ({"k": (2, 7, 2, 4), "v": (2, 7, 2, 4)}, {}, "shapes do not fit"),
        ({"k": (1, 8, 2, 4), "v": (1, 8, 2, 4)}, {}, "shapes do not fit"),
        ({"k": (2, 8, 2, 5)}, {}, "shapes do not fit"),
        ({"v": (2, 8, 2, 5)}, {}, "shapes do not fit"),
        ({"v": (2, 8, 1, 4)}, {}, "shapes do not fit"),
        ({"q": (2, 8, 4, 5)}, {}, "shapes do not fit"),
        ({}, {"window": 0}, "window is"),
        ({}, {"window": (4, 0)}, "window is"),
        ({}, {"window": (4, 4, 4)}, "window is"),
        ({}, {"window": (4,)}, "window is"),
        ({}, {"window": torch.tensor([4, -1])}, "window is"),
        ({}, {"gate": torch.ones(3)}, r"gate has shape \(3,\), but must be \(2,\) or \(2, 2\)"),
        ({}, {"gate": torch.ones(1, 2)}, "gate has shape"),
        ({}, {"gate": torch.ones(2, 4)}, "gate has shape"),
        ({}, {"gate": torch.tensor(0.5)}, "gate has shape"),
        (
            {},
            {"documents": torch.zeros(2, 7)},
            r"documents has shape \(2, 7\), but must be \(2, 8\)",
        ),
        ({}, {"documents": torch.zeros(8)}, "documents has shape"),
        ({}, {"backend": "cudnn"}, "backend cudnn is unknown"),
        (
            {},
            {"gate": torch.ones(2, dtype=torch.float64)},
            "gate is torch.float64, but must be torch.float32",
        ),
        ({}, {"gate": torch.ones(2, device="meta")}, "gate is on meta, but q is on cpu"),
        (
            {},
            {"documents": torch.zeros(2, 8, dtype=torch.int64)},
            "documents is torch.int64, but must be torch.int32",
        ),
        (
            {},
            {"v": torch.zeros(2, 8, 2, 4, dtype=torch.bfloat16)},
            "must have one floating-point precision",
        ),
        (
            {},
            {
                name: torch.zeros(2, 8, 4 if name == "q" else 2, 4, dtype=torch.int32)
                for name in "qkv"
            },
            "floating-point",
        ),
        ({}, {"k": torch.zeros(2, 8, 2, 4, device="meta")}, "k is on meta, but q is on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    shapes: dict[str, tuple[int, ...]], arguments: dict[str, object], message: str
) -> None:
    fitting = {"q": (2, 8, 4, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 4)}
    tensors = {name: torch.zeros(shapes.get(name, shape)) for name, shape in fitting.items()}
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**(tensors | {"window": 4} | arguments))  # type: ignore[arg-type]
