"""`megaconsa quickstart`: the whole way on one machine, by the commands that a user would type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaconsa.console import console, run_tool


def main(
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path("runs/quickstart"),
) -> None:
    """Text in, a learned allocation, a Hugging Face model out: a few minutes on two CPU cores.

    An interrupted quickstart goes on where it stopped when it is run again.

    Example: megaconsa quickstart
    """
    import shutil
    import time

    from megaconsa import configs
    from megaconsa.tools import quickstart_steps as steps

    started = time.monotonic()
    yaml = Path(configs.__file__).parent
    data, learn, train = folder / "data", folder / "learn", folder / "train"
    allocation, exported = folder / "allocation.json", folder / "hf"

    steps.say("Collect Python's own sources, train a tokenizer on them, pack them into shards")
    steps.run("prepare-data", "python", "--out", data, "--train-tokenizer", 4096, "--sequence-length", 512)
    steps.say("Stage 1: learn which KV heads keep full attention, together with the weights")
    steps.run("train", yaml / "quickstart.yaml", f"run.dir={learn}", f"data.path={data}")
    steps.say("Binarise the gates: half of each layer's KV heads keep full attention")
    steps.run("finalize-masks", learn, "--out", allocation)
    steps.say("Stage 2: train on with that allocation")
    steps.run(
        "train",
        yaml / "quickstart_train.yaml",
        f"run.dir={train}",
        f"data.path={data}",
        f"model.init_from={learn}",
        f"allocation.file={allocation}",
    )
    steps.say("Hand the model over in Hugging Face format")
    shutil.rmtree(exported, ignore_errors=True)  # made by an earlier quickstart in this folder; export-hf never overwrites
    steps.run("export-hf", train, "--out", exported, "--dtype", "float32")
    steps.say("Load it with transformers, compare its logits with the checkpoint's, let it write a line")
    difference, line = steps.try_export(exported, train)
    console.print(line, markup=False)
    steps.say("Write the report")
    steps.run("report", folder)
    console.print(steps.summary(folder, difference))
    console.print(f"\n{time.monotonic() - started:.0f} s in all", markup=False)


if __name__ == "__main__":
    run_tool(main)
