"""Launch configurations.

These tests cover the packaged file, the user's file that overrides it, the lookup, and tuning.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from megaconsa import cli
from megaconsa.benchmarks.attention import tuning
from megaconsa.benchmarks.attention.cases import Shape
from megaconsa.kernels.attention import launch
from megaconsa.kernels.attention.launch import (
    HOPPER,
    Launch,
    find,
    forced,
    packaged,
    read,
    to_text,
)
from megaconsa.kernels.attention.triton.operators import attention
from megaconsa.kernels.limits import DTYPES, HEAD_DIMS
from tests.support.attention_cases import FULL, Case, check, draw

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton compiles for the GPU here"
)

STEPS = ("forward", "backward")
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0)]
ENTRY = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 3}
PACKAGED = [
    (architecture, step, shape, entry)
    for architecture, steps in packaged().items()
    for step, entries in steps.items()
    for shape, entry in entries.items()
]


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Path]]:
    """Writes the file that the environment variable names.

    Text is written unchanged. Anything else is written as JSON.
    """
    path = tmp_path / "launch.json"
    monkeypatch.setenv("MEGACONSA_LAUNCH_FILE", str(path))
    launch.launches.cache_clear()

    def write(content: Any) -> Path:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    yield write
    launch.launches.cache_clear()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("gated", [False, True], ids=["allocated", "gated"])
def test_every_shape_has_a_launch_on_every_device(capability: tuple[int, int], gated: bool) -> None:
    for step in STEPS:
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                found = find(packaged(), capability, step, dtype, head_dim, gated=gated)
                assert 128 % found.block_m == 0
                width = "fp32" if dtype == torch.float32 else "16-bit"
                assert found in tuning.CANDIDATES[step, width]


def test_packaged_file_is_written_as_tuning_writes() -> None:
    text = Path(launch.__file__).with_name("launch.json").read_text()
    assert to_text(packaged()) == text
    assert len(PACKAGED) == text.count("block_m")


@pytest.mark.parametrize("head_dim", [33, 64, 65, 80, 96, 128])
def test_hopper_kernels_keep_their_tiles(head_dim: int) -> None:
    q = torch.empty(1, 8, 2, head_dim, dtype=torch.bfloat16)
    assert launch.forward_launch(q, gated=True, hopper=True)[:3] == (128, 128, 8)
    assert launch.backward_launch(q, gated=False, hopper=True)[:3] == (64, 128, 8)


def test_the_hopper_kernels_want_a_query_for_every_key() -> None:
    q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16)
    assert not launch.on_hopper(q[:, 4:], q)


def test_cpu_takes_small_tiles() -> None:
    q = torch.empty(1, 8, 2, 128, dtype=torch.bfloat16)
    forward = launch.forward_launch(q, gated=False, hopper=False)
    backward = launch.backward_launch(q, gated=True, hopper=False)
    assert forward == launch.INTERPRETED["forward"]
    assert backward == launch.INTERPRETED["backward"]
    with forced(forward=Launch(16, 64, 1, 1), backward=Launch(32, 16, 1, 1)):
        assert launch.forward_launch(q, gated=False, hopper=False) == (16, 64, 1, 1)
        assert launch.backward_launch(q, gated=False, hopper=False) == (32, 16, 1, 1)
    assert launch.forward_launch(q, gated=False, hopper=False) == forward


def test_the_users_entries_win(user_file: Callable[[Any], Path]) -> None:
    user_file(
        {"sm90": {"forward": {"fp32/64": ENTRY}}, "sm89": {"backward": {"16-bit/128/gated": ENTRY}}}
    )
    table = launch.launches()
    own = packaged()
    mine = Launch(**ENTRY)
    for gated in (False, True):
        assert find(table, (9, 0), "forward", torch.float32, 64, gated=gated) == mine
        other_shape = find(table, (9, 0), "forward", torch.float32, 16, gated=gated)
        assert other_shape == own["sm90"]["forward"]["fp32/16"]
        other_device = find(table, (8, 6), "forward", torch.float32, 64, gated=gated)
        assert other_device == own["default"]["forward"]["fp32/64"]
    assert find(table, (8, 9), "backward", torch.float16, 96, gated=True) == mine
    ungated = find(table, (8, 9), "backward", torch.float16, 96, gated=False)
    assert ungated == own["default"]["backward"]["16-bit/128"]
    other_step = find(table, (8, 9), "forward", torch.float16, 96, gated=True)
    assert other_step == own["default"]["forward"]["16-bit/128"]


def test_without_a_file_the_packaged_launches_hold(
    user_file: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGACONSA_LAUNCH_FILE")
    assert launch.launches() == packaged()


def entry(**changed: Any) -> dict[str, Any]:
    return {"sm90": {"forward": {"fp32/64": {**ENTRY, **changed}}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Expecting value"),
        ('{"sm90": ', "Expecting value"),
        ([], "expected an object"),
        ({"sm90": 3}, "expected an object"),
        ({"hopper": {}}, "'hopper' is not an architecture"),
        ({"sm90": {"sideways": {}}}, "'sideways' is not a pass"),
        ({"sm90": {"forward": {"fp32/80": ENTRY}}}, "'fp32/80' is not a shape"),
        (
            {"sm90": {"forward": {"16-bit/128/gated": ENTRY}}},
            "sm90 forward 16-bit/128/gated is fixed",
        ),
        (
            {"sm90": {"forward": {"fp32/64": {"block_m": 64}}}},
            "must have block_m, block_n, num_warps, num_stages",
        ),
        (entry(waves=1), "must have"),
        (entry(num_stages=0), "positive whole numbers"),
        (entry(num_stages=True), "positive whole numbers"),
        (entry(block_m="64"), "positive whole numbers"),
        (entry(block_m=256), "block_m 256, not a power of two from 16 to 128"),
        (entry(block_n=48), "block_n 48"),
        (entry(block_n=8), "block_n 8"),
        (entry(num_warps=3), "num_warps 3"),
    ],
)
def test_damaged_file_is_refused(user_file: Callable[[Any], Path], content: Any, said: str) -> None:
    path = user_file(content)
    with pytest.raises(
        ValueError, match=re.escape(f"the launch file {path} is damaged: ")
    ) as refusal:
        launch.launches()
    assert said in str(refusal.value)
    assert str(refusal.value).count("\n") == 0
    assert str(refusal.value).endswith("unset MEGACONSA_LAUNCH_FILE")


def test_bytes_that_are_no_text_are_refused(user_file: Callable[[Any], Path]) -> None:
    user_file("").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged: 'utf-8' codec"):
        launch.launches()


def test_missing_file_is_refused(user_file: Callable[[Any], Path]) -> None:
    with pytest.raises(
        ValueError, match=r"launch\.json cannot be read \(No such file or directory\); make it with"
    ):
        launch.launches()


def distinct_launches() -> list[tuple[Launch, Launch, int]]:
    """The distinct triples of forward launch, backward launch and head dimension."""
    table = packaged()
    found = {(HOPPER["forward"], HOPPER["backward"], 64)}
    for capability in CAPABILITIES:
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (16, 64):
                forward, backward = (
                    find(table, capability, step, dtype, head_dim, gated=True) for step in STEPS
                )
                found.add((forward, backward, head_dim))
    return sorted(found)


@interpreted
@pytest.mark.parametrize(("forward", "backward", "head_dim"), distinct_launches(), ids=str)
def test_packaged_tiles_are_right(forward: Launch, backward: Launch, head_dim: int) -> None:
    """Runs in fp32 whatever the precision of the launch is.

    The interpreter multiplies bf16 wrongly. The tiles are the same.
    """
    with forced(forward=forward, backward=backward):
        check(attention, draw(Case(150, (40, FULL), (0.4, 0.8), ((149, 1),), dim=head_dim)), 1e-5)
        check(attention, draw(Case(131, (FULL,), dim=head_dim)), 1e-5)


SMALL = Shape(1, 40, 2, 2, 16, 6, torch.float32, torch.device("cpu"))


@interpreted
def test_tuning_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on a CPU with real kernels.

    Only the name of the device, its clock and its limits are simulated.
    """
    slow = Launch(32, 32, 4, 1)
    fast = Launch(16, 32, 4, 1)
    wrong = Launch(16, 16, 4, 1)
    large = Launch(64, 64, 4, 1)
    inside: list[Launch] = []

    def stopwatch(run: Callable[[], Any], return_mode: str) -> float:
        run()
        inside.append(launch._forced["forward"])
        return {slow: 2.0, fast: 1.0}[inside[-1]]

    def errors(
        results: Any, expected: Any, inputs: Any, real: Any = tuning.errors
    ) -> dict[str, float]:
        if launch._forced["forward"] == large:
            raise triton.OutOfResources(2, 1, "shared memory")
        measured = real(results, expected, inputs)
        if launch._forced["forward"] == wrong:
            return dict.fromkeys(measured, float("nan"))
        return measured

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "do_bench", stopwatch)
    monkeypatch.setattr(tuning, "errors", errors)
    monkeypatch.setattr(
        tuning, "CANDIDATES", {(step, "fp32"): (slow, fast, large, wrong) for step in STEPS}
    )
    trials: list[tuning.Trial] = []
    found = tuning.tune(SMALL, trials.append)
    assert found == {"sm90": {step: {"fp32/16": fast, "fp32/16/gated": fast} for step in STEPS}}
    assert [(trial.milliseconds, trial.reason) for trial in trials] == 4 * [
        (2.0, ""),
        (1.0, ""),
        (None, "does not fit"),
        (None, "wrong"),
    ]
    assert inside == 4 * [slow, fast]
    monkeypatch.setattr(tuning, "CANDIDATES", {(step, "fp32"): (large, wrong) for step in STEPS})
    with pytest.raises(RuntimeError, match="no candidate serves the forward pass of mixed"):
        tuning.tune(SMALL, trials.append)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_fixed_launches_are_not_tuned(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shape = Shape(1, 40, 2, 2, head_dim, 6, torch.bfloat16, torch.device("cpu"))
    assert "their launches are fixed" in str(tuning.refusal(shape))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert tuning.refusal(shape) is None


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `megaconsa bench-attention --tune ...` in this process.

    Returns exit code, stdout, stderr.
    """

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megaconsa", "bench-attention", "--tune", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def test_tune_needs_a_gpu(
    bench: Callable[..., tuple[int, str, str]],
    user_file: Callable[[Any], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, error = bench()
    assert (code, error.count("\n")) == (2, 1)
    assert "--tune needs a CUDA GPU" in error
    assert not list(tmp_path.iterdir())


def test_tune_takes_no_case_and_no_out(
    bench: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for arguments in (["--case", "dense"], ["--out", str(tmp_path / "out.json")]):
        code, _, error = bench(*arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert "--tune does not go with --case or --out" in error


SMALL_COMMAND = (
    "--batch",
    "1",
    "--length",
    "200",
    "--heads",
    "2",
    "--kv-heads",
    "2",
    "--window",
    "40",
    "--head-dim",
    "16",
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tune_needs_a_file_a_sound_one_and_a_shape_to_tune(
    bench: Callable[..., tuple[int, str, str]],
    user_file: Callable[[Any], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = user_file("{")
    code, _, error = bench(*SMALL_COMMAND)
    assert (code, error.count("\n")) == (2, 1)
    assert f"the launch file {path} is damaged" in error
    if torch.cuda.get_device_capability() == (9, 0):
        assert "their launches are fixed" in bench(*SMALL_COMMAND[:-1], "128")[2]
    monkeypatch.delenv("MEGACONSA_LAUNCH_FILE")
    code, _, error = bench(*SMALL_COMMAND)
    assert (code, error.count("\n")) == (2, 1)
    assert "MEGACONSA_LAUNCH_FILE, which is not set" in error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tune_writes_what_it_found(
    bench: Callable[..., tuple[int, str, str]],
    user_file: Callable[[Any], Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    path = user_file({"sm99": {"forward": {"fp32/64": ENTRY}}})
    width = "fp32" if dtype == "fp32" else "16-bit"
    for step in STEPS:
        few = tuning.CANDIDATES[step, width][:1] + tuning.CANDIDATES[step, width][-1:]
        monkeypatch.setitem(tuning.CANDIDATES, (step, width), few)
    code, out, error = bench(*SMALL_COMMAND, "--dtype", dtype)
    assert (code, error) == (0, "")
    assert "gated backward block_m=" in out
    assert f"wrote {path}" in out
    table = read(path)
    assert table.pop("sm99") == {"forward": {"fp32/64": Launch(**ENTRY)}}
    [steps] = table.values()
    assert {step: sorted(entries) for step, entries in steps.items()} == {
        step: [f"{width}/16", f"{width}/16/gated"] for step in STEPS
    }
    assert (
        launch.launches()[launch.architecture_key(torch.cuda.get_device_capability())][
            "forward"
        ].items()
        >= steps["forward"].items()
    )
