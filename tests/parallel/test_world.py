"""What a process checks before it joins the others."""

from __future__ import annotations

import pytest
import torch

from megaconsa.errors import InputError
from megaconsa.parallel import world
from megaconsa.parallel.launcher import Launch


def place(hides_gpus: bool) -> Launch:
    return Launch(rank=6, size=8, local_rank=2, address="head", port=7, hides_gpus=hides_gpus)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="local rank 2 has no GPU: this process sees 2"):
        world._gpu(place(hides_gpus=True))


def test_a_process_that_sees_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1 shows each process its own GPU.

    Under torchrun, one visible GPU is one GPU for all processes.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert world._gpu(place(hides_gpus=True)) == 0
    with pytest.raises(InputError, match="this process sees 1"):
        world._gpu(place(hides_gpus=False))
