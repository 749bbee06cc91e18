"""`megaconsa bench-attention`: compares our attention with that of other libraries.

All are checked first, then timed on the same tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaconsa.console import check_out, console, run_tool

if TYPE_CHECKING:
    from megaconsa.benchmarks.attention.cases import Shape

CASES = "dense, window, mixed, gated, gated-half, gated-partly, packed, packed-mixed, packed-gated"

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Torch's names."""


def main(
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences. Default 4; without a GPU 1.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a sequence. Default 8192; without a GPU 256."),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 16,
    kv_heads: Annotated[
        int, typer.Option(min=2, help="KV heads, at least 2, since some cases mix two kinds.")
    ] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Values of a head.")] = 128,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Keys of a windowed head. Default 1024; without a GPU 64."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32. Default bf16; without a GPU fp32.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help=f"Case to run, may be repeated: {CASES}. Default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Find the fastest launches of the Triton kernels for this shape, "
            "into MEGACONSA_LAUNCH_FILE.",
        ),
    ] = False,
) -> None:
    r"""Check attention's backends and peers against fp64, then time them in turns, forward and
    backward.

    Reports no speed and exits with 1 if one of our backends is wrong.

    Example:

        megaconsa bench-attention --batch 1 --length 32768 --case dense \
            --case mixed --out attention.json
    """
    from json import dumps

    from megaconsa.errors import InputError

    # Imports of torch come after what is most often refused.
    for name in case or []:
        if name not in CASES.split(", "):
            raise InputError(f"--case {name} is unknown; choose one of {CASES}")
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
    if heads % kv_heads:
        raise InputError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")

    import torch

    from megaconsa.benchmarks.attention.benchmark import device_name, run_benchmark
    from megaconsa.benchmarks.attention.cases import Shape
    from megaconsa.benchmarks.attention.peers import contestants
    from megaconsa.benchmarks.attention.tables import errors_table, footer, times_table
    from megaconsa.files import replace_text

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    dtype = dtype or ("bf16" if gpu else "fp32")
    batch = batch or (4 if gpu else 1)
    length = length or (8192 if gpu else 256)
    window = window or (1024 if gpu else 64)
    # Several documents must fit into a sequence, else the packed cases have none to hide.
    document_median = 600 if gpu else 30
    if window >= length:
        raise InputError(
            f"--window {window} must be smaller than --length {length}, "
            "or windowed heads are full ones"
        )
    if out is not None:
        check_out(out)
    shape = Shape(
        batch,
        length,
        heads,
        kv_heads,
        head_dim,
        window,
        getattr(torch, DTYPES[dtype]),
        device,
        document_median,
    )
    if tune and (case or out is not None):
        raise InputError(
            "--tune does not go with --case or --out: "
            "it measures cases of its own and writes the launch file"
        )
    if tune:
        _tune(shape)
        return
    console.print(
        f"{device_name(device)}: {dtype}, batch {batch}, length {length}, "
        f"{heads} / {kv_heads} heads of {head_dim}"
    )
    if not gpu:
        console.print(
            "No GPU: these figures say nothing about the kernels, which run on GPUs alone."
        )
    benchmark = run_benchmark(
        shape, case or [], contestants(device), lambda checked: console.print(errors_table(checked))
    )
    console.print(times_table(benchmark))
    for line in footer(benchmark):
        console.print(line, markup=False)
    if out is not None:
        options = {
            "batch": batch,
            "length": length,
            "heads": heads,
            "kv-heads": kv_heads,
            "head-dim": head_dim,
            "window": window,
            "dtype": dtype,
        }
        words = " ".join(f"--{name} {value}" for name, value in options.items())
        chosen = "".join(f" --case {name}" for name in case or [])
        command = f"megaconsa bench-attention {words}{chosen}"
        replace_text(out, dumps(benchmark.to_dict(command), indent=1) + "\n")
        console.print(f"wrote {out}", markup=False)


def _tune(shape: Shape) -> None:
    """Adds the fastest launches for the shape to the user's file and keeps its other entries."""
    from megaconsa.errors import InputError, RunError
    from megaconsa.files import replace_text
    from megaconsa.kernels.attention.launch import FILE_VARIABLE, merged, read, to_text, user_file

    if shape.device.type != "cuda":
        raise InputError("--tune needs a CUDA GPU; run it on the machine that trains")
    path = user_file()
    if path is None:
        raise InputError(
            f"--tune writes the file named by {FILE_VARIABLE}, which is not set; "
            f"export {FILE_VARIABLE}=launch.json"
        )
    check_out(path)
    from megaconsa.benchmarks.attention.tuning import Trial, refusal, tune

    def show(trial: Trial) -> None:
        launch = " ".join(f"{name}={value}" for name, value in trial.launch._asdict().items())
        result = trial.reason if trial.milliseconds is None else f"{trial.milliseconds:.3f} ms"
        console.print(f"{trial.case} {trial.step} {launch}: {result}")

    reason = refusal(shape)
    if reason is not None:
        raise InputError(reason)
    try:
        held = read(path) if path.exists() else {}
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        found = tune(shape, show)
    except RuntimeError as error:
        raise RunError(str(error)) from None
    replace_text(path, to_text(merged(held, found)))
    console.print(to_text(found), markup=False)
    console.print(f"wrote {path}", markup=False)


if __name__ == "__main__":
    run_tool(main)
