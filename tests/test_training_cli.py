"""The command lines of training and evaluation: options, presets and results."""

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Run
from cyclopts import App, Parameter

from model.cli import COMMANDS, main
from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.self_training.rounds import read_teacher_info
from training.trainer.config import SelfTrainingConfig


def make_app(command: str) -> App:
    """The application with one subcommand."""
    app = App(name="useg", default_parameter=Parameter(negative_iterable=(), consume_multiple=True))
    app.command(COMMANDS["Train"][command][0], name=command)
    return app


def parse_config(*options: str) -> MaskTransformerTrainConfig | CascadeTrainConfig:
    """The configuration that `useg train` makes of these options."""
    _, bound, _ = make_app("train").parse_args(["train", *options])
    config = bound.arguments.get("config")
    if config is None:  # nothing was given: the default of the function
        config = bound.signature.parameters["config"].default
    assert isinstance(config, MaskTransformerTrainConfig | CascadeTrainConfig)
    return config


@pytest.mark.parametrize("name", MASK_TRANSFORMER_PRESETS)
def test_a_preset_sets_the_options_that_are_not_given(name: str) -> None:
    preset = MASK_TRANSFORMER_PRESETS[name]
    assert parse_config("LABELS", "--out", "RUN", "--preset", name) == preset
    changed = parse_config("LABELS", "--out", "RUN", "--max-steps", "7", "--no-droploss", "--preset", name)
    assert changed == replace(preset, max_steps=7, droploss=False)
    assert parse_config("LABELS", "--out", "RUN") == MASK_TRANSFORMER_PRESETS["cpu"]


@pytest.mark.parametrize("name", CASCADE_PRESETS)
def test_presets_of_the_cascade(name: str) -> None:
    config = parse_config("panoptic-cascade", "LABELS", "--out", "RUN", "--preset", name, "--milestones", "5", "6")
    assert config == replace(CASCADE_PRESETS[name], milestones=(5, 6))
    assert parse_config("panoptic-cascade", "LABELS", "--out", "RUN") == CASCADE_PRESETS["u2seg-coco"]


@pytest.mark.parametrize("command", ["train", "train panoptic-cascade", "self-train", "finetune"])
def test_every_option_has_a_help_text(command: str) -> None:
    app = make_app(command.split()[0])
    for name in command.split():
        app = app[name]
    arguments = app.assemble_argument_collection(parse_docstring=True)
    assert [argument.name for argument in arguments if argument.show and not argument.parameter.help] == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train LABELS --out RUN --max-steps 0", "Must be > 0"),
        ("train LABELS --out RUN --steps 3", "--max-steps"),  # did you mean
        ("train LABELS --out RUN --preset plain", "panoptic-targets"),
        ("train LABELS --out RUN --backbone vit", "--backbone"),
        ("label PHOTOS --out LABELS --side-px 54", '"54" for --side-px. Must be a multiple of 4'),
        ("label PHOTOS --out LABELS --objects-per-image 13", "Must be <= 12"),
        ("label PHOTOS --out LABELS --seed -1", "Must be >= 0"),
        ("eval ARTIFACT --dataset SET --match-min-stuff-iou 1.5", '"1.5" for --match-min-stuff-iou. Must be <= 1'),
        ("gate NEW OLD --max-psi 0", "Must be > 0"),
        ("self-train RUN LABELS --min-relative-score 1.5", "Must be <= 1"),
        ("train panoptic-cascade LABELS --out RUN --side-px 100", "Must be a multiple of 32"),
        ("train panoptic-cascade LABELS --out RUN --min-sizes 0", "Must be > 0"),
        ("train panoptic-cascade LABELS --out RUN --sem-seg-loss-stride 2", "--sem-seg-loss-stride"),
    ],
)
def test_wrong_options_are_reported_on_one_line(capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    assert main(command.split()) in (1, 2)
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1


def test_train_and_self_train(tmp_path: Path, tiny_store: PseudoLabelDataset, useg: Run) -> None:
    common = ("--features", tiny_store.features, "--threads", 1)
    run, labels, out = tmp_path / "run", tiny_store.folder, tmp_path / "labels"
    assert useg("train", labels, "--out", run, "--preset", "tiny", *common).result["step"] == 4
    report = useg("self-train", run, labels, "--out", out, *common).result
    assert (report["round"], report["photos"]) == (1, 8)
    info = read_teacher_info(PseudoLabelDataset(out))
    assert info is not None
    assert info.min_relative_score == SelfTrainingConfig().min_relative_score
