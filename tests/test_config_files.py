"""Files of the run configuration: overrides, refused files, round trips, and paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megaconsa.config import Config, build, differences, load
from megaconsa.errors import InputError
from tests.support.config_cases import BASE, changed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_overrides_apply_typed_values(file: Path) -> None:
    config = load(
        file,
        [
            "training.steps=20",
            "training.learning_rate=3e-4",
            "training.betas=[0.8, 0.9]",
            "training.activation_checkpointing=true",
            "model.tie_word_embeddings=false",
            "model.init_from=runs/b=c",
            "logging.wandb=null",
            "checkpoint.every=5",
            "training.steps=30",
        ],
    )
    assert config.training.steps == 30
    assert config.training.learning_rate == 3e-4
    assert config.training.betas == (0.8, 0.9)
    assert config.training.activation_checkpointing is True
    assert config.to_model_config().tie_word_embeddings is False
    assert config.model.init_from == Path("runs/b=c")
    assert config.logging.wandb is None
    assert config.checkpoint.every == 5
    assert config.training.global_batch == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "override 'training.steps' is not of the form section.field=value"),
        ("steps=3", "is not of the form section.field=value"),
        ("training.=3", "is not of the form section.field=value"),
        (".steps=3", "is not of the form section.field=value"),
        ("a.b.c=3", "is not of the form section.field=value"),
        ("=3", "is not of the form section.field=value"),
        ("training.betas=[0.9", "override 'training.betas=[0.9': the value is not YAML"),
        ("training.steps=1__0", "override 'training.steps=1__0'"),
        ("logging.wandb=2024-13-45", "the value is not YAML (month must be in 1..12)"),
        ("training.steps=" + "[" * 2000, "the value is not YAML"),
        ("training.steps=", "training.steps=None is refused"),
        ("training.steps=ten", "training.steps='ten' is refused"),
        ("trainnig.steps=3", "unknown field trainnig; did you mean training?"),
        (
            "training.stpes=3",
            "unknown field training.stpes in section training; did you mean training.steps?",
        ),
        ("attention.window=64", "attention.window=64 must lie between 1 and"),
    ],
)
def test_overrides_that_are_refused(override: str, message: str, file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is not a mapping of sections"),
        (b"- run\n- model\n", "is not a mapping of sections"),
        (b"run: {dir: a\nmodel:", "cannot be read"),
        (b"run:\n\t- dir", "cannot be read"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"run: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_files_that_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    assert f"configuration {path} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


def test_an_override_of_what_is_no_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {"training": 3}))
    with pytest.raises(InputError, match="section training of the configuration is not a mapping"):
        load(path, ["training.steps=3"])


def test_dictionary_goes_through_yaml_and_back(file: Path) -> None:
    config = load(
        file,
        [
            "training.learning_rate=1e-05",
            "model.init_from=runs/b",
            "training.betas=[0.8, 0.9]",
            "model.vocab_size=7",
        ],
    )
    text = yaml.safe_dump(config.to_dict())
    assert build(yaml.safe_load(text)) == config
    assert differences(config.to_dict(), yaml.safe_load(text)) == []
    assert config.to_dict().keys() == Config.model_fields.keys()


def test_a_section_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {steps: 1}\ntraining: {steps: 2}\n")
    with pytest.raises(InputError, match="training is given twice"):
        load(path)


def test_a_section_without_fields_takes_the_defaults() -> None:
    assert build(changed(model=None)).model.preset == "tiny"


def test_paths_are_expanded(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants a folder that is really called ~ or $SCRATCH."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(
        file, ["run.dir=$SCRATCH/runs/a", "model.init_from=~/runs/b", "data.path=${SCRATCH}/data"]
    )
    assert config.run.dir == tmp_path / "runs" / "a"
    assert config.model.init_from == Path("/home/someone/runs/b")
    assert config.data.path == tmp_path / "data"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.dir=$NOT_SET_ANYWHERE/a", "the environment has no variable $NOT_SET_ANYWHERE"),
        ("run.dir=~nobody_of_this_name/a", "there is no user ~nobody_of_this_name"),
        ("run.seed=010", "010 is not a plain decimal number, and YAML would read it as 8"),
        ("training.steps=1:30", "1:30 is not a plain decimal number, and YAML would read it as 90"),
        ("training.steps=0x10", "0x10 is not a plain decimal number"),
        ("logging.wandb=None", "write null where nothing is meant"),
        ("model.init_from=None", "write null where nothing is meant"),
    ],
)
def test_what_yaml_or_a_path_would_take_for_something_else(
    override: str, said: str, file: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load(file, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_numbers_may_be_grouped(file: Path) -> None:
    assert load(file, ["training.steps=1_000"]).training.steps == 1000
