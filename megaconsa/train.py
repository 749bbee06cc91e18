"""One rank's entry: python -m megaconsa.train CONFIG [section.field=value ...], \
alone or under torchrun, deepspeed or srun.

Example: torchrun --nproc_per_node 8 -m megaconsa.train configs/qwen3_0p6b_learn.yaml run.dir=runs/a
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from megaconsa import config as configuration
from megaconsa.console import console, guarded
from megaconsa.errors import InputError, UnreachableError
from megaconsa.exit_codes import DONE, FAILED, LOST, STOPPED
from megaconsa.parallel import launcher
from megaconsa.reading import is_out_of_reach
from megaconsa.training.early_checks import check_early


def train(config_path: Path, overrides: list[str]) -> int:
    """Starts or resumes a training run. Returns the exit code.

    config_path: YAML file of the configuration.
    overrides: `section.field=value`.
    Raises InputError if an input is refused.
    """
    _log_to_console()
    # A single process checks the configuration before it imports torch and DeepSpeed, which takes
    # seconds. With several ranks, the check comes later, so that only one rank reports an error.
    alone = launcher.launch().size == 1
    config = configuration.load(config_path, overrides) if alone else None
    if config is not None:
        check_early(config)
    from megaconsa.parallel.world import is_joined, join, leave
    from megaconsa.training.inputs import check_inputs

    world = join()
    config = config or world.agreed(lambda: configuration.load(config_path, overrides))
    trainer = None
    try:
        inputs = check_inputs(config, world)
        if inputs.resume is not None and inputs.resume.step == config.training.steps:
            if world.is_main:
                step = inputs.resume.step
                console.print(
                    f"{config.run.dir} is finished: step {step}, {inputs.resume.path}",
                    markup=False,
                )
            leave()
            return DONE
        from megaconsa.parallel.mesh import initialize
        from megaconsa.training.attention_backends import log_backends
        from megaconsa.training.setup import build_trainer
        from megaconsa.training.start_checks import check_machines
        from megaconsa.training.trainer import Stop

        check_machines(inputs, world)
        log_backends(inputs.config, inputs.model_config, inputs.allocation, world.device)
        mesh = initialize(config.parallel, world)
        trainer = build_trainer(inputs, mesh)
        finished = trainer.run()
    except InputError:
        raise  # All ranks agree on it, and nothing has started.
    except Exception as error:
        from megaconsa.training import failures

        if isinstance(error, UnreachableError) and not is_joined():
            raise  # All ranks agree on this error too.
        away = isinstance(error, OSError) and is_out_of_reach(error)
        code = LOST if away or isinstance(error, UnreachableError) else FAILED
        current_step = trainer.progress.step + 1 if trainer else None
        return failures.end(error, config.run.dir, world, current_step, code=code)
    leave()
    asked = trainer.stop is Stop.ASKED
    if world.is_main:
        if finished:
            state = "finished"
        else:
            state = f"stopped{' as asked' if asked else ''}, the same command resumes it"
        progress = trainer.progress
        console.print(
            f"{config.run.dir}: {state} at step {progress.step}, {progress.tokens:,} tokens",
            markup=False,
        )
    return DONE if finished or asked else STOPPED


def _main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    arguments = _without_local_rank(arguments)
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            "give a configuration: python -m megaconsa.train CONFIG [section.field=value ...]"
        )
    return train(Path(arguments[0]), arguments[1:])


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Removes --local_rank=N and --local-rank=N, also if given as two words.

    Some launchers put this option first. It is not needed, because they set LOCAL_RANK as well.
    """
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        name = word.partition("=")[0]
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
        elif word == name:
            next(words, None)  # Skip the value, which is the next word.
    return kept


def _log_to_console() -> None:
    """Sets up logging to stdout.

    The main rank logs megaconsa's INFO messages. The other ranks log errors only, because all ranks
    give the same warnings. Libraries log warnings and errors only.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    # torch deprecates collectives that DeepSpeed calls. A user of megaconsa cannot fix that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    level = logging.INFO if launcher.is_main() else logging.ERROR
    logging.getLogger("megaconsa").setLevel(level)


if __name__ == "__main__":
    guarded(lambda: sys.exit(_main(sys.argv[1:])))
