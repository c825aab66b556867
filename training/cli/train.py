"""The commands `useg train`, `self-train` and `finetune`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, ArgumentCollection, Parameter, Token
from cyclopts.types import NonNegativeInt, PositiveFloat, PositiveInt

from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig, finetune_config
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.trainer.config import RunOptions, SelfTrainingConfig, TrainConfig

MaskTransformerPreset = Literal["cpu", "gpu", "panoptic-targets", "tiny"]
CascadePreset = Literal["u2seg-coco", "u2seg-imagenet", "cutler", "gpu", "tiny"]
_FLAT = Parameter(name="*")
_SELF_TRAINING = SelfTrainingConfig()


def use_preset(presets: Mapping[str, TrainConfig]) -> Callable[[App, tuple[str, ...], ArgumentCollection], None]:
    """Return a cyclopts configuration source: options that are not given take the values of `--preset`."""

    def apply(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        by_name = {argument.name: argument for argument in arguments}
        chosen = by_name["--preset"].tokens if "--preset" in by_name else []
        preset = presets.get(chosen[-1].value) if chosen else None
        for entry in fields(preset) if preset else ():
            argument, value = by_name[f"--{entry.name.replace('_', '-')}"], getattr(preset, entry.name)
            if argument.tokens or value == entry.default:
                continue
            for index, each in enumerate(value if isinstance(value, tuple) else (value,)):
                argument.append(Token(keyword=argument.name, value=str(each), source="preset", index=index))

    return apply


train = App(name="train", config=use_preset(MASK_TRANSFORMER_PRESETS))
_cascade = App(name="panoptic-cascade", config=use_preset(CASCADE_PRESETS))
train.command(_cascade)


@train.default
def train_mask_transformer(
    labels: Path,
    /,
    *,
    run: Annotated[RunOptions, _FLAT],
    preset: MaskTransformerPreset = "cpu",
    config: Annotated[MaskTransformerTrainConfig, _FLAT] = MASK_TRANSFORMER_PRESETS["cpu"],
) -> dict[str, Any] | None:
    """Train a mask transformer on pseudo-labels.

    Writes a run with weights, checkpoint, TensorBoard events and losses.csv. Repeat the command to continue a run that
    was stopped. To train on several processes, start it with `torchrun --nproc-per-node N -m model train`.

    Parameters
    ----------
    labels
        Folder of pseudo-labels.
    preset
        Values of the options that are not given. cpu: as the bundled model, about an hour on two cores. gpu: from
        pixels, on one large GPU. panoptic-targets: only the visible segments, all alike. tiny: a smoke test.
    """
    return _train(labels, run, config)


@_cascade.default
def train_panoptic_cascade(
    labels: Path,
    /,
    *,
    run: Annotated[RunOptions, _FLAT],
    preset: CascadePreset = "u2seg-coco",
    backbone_weights: str = "",
    config: Annotated[CascadeTrainConfig, _FLAT] = CASCADE_PRESETS["u2seg-coco"],
) -> dict[str, Any] | None:
    """Train a panoptic cascade (Panoptic Cascade Mask R-CNN), the network of the U2Seg paper, on pseudo-labels.

    Parameters
    ----------
    labels
        Folder of pseudo-labels.
    preset
        Values of the options that are not given. u2seg-coco, u2seg-imagenet, cutler: published schedules. gpu: 30
        minutes on one large GPU. tiny: a smoke test.
    backbone_weights
        Path or URL of a published ResNet-50; only with --backbone resnet50.
    """
    return _train(labels, run, config, backbone_weights)


def _train(
    labels: Path,
    run: RunOptions,
    config: MaskTransformerTrainConfig | CascadeTrainConfig,
    backbone_weights: str = "",
) -> dict[str, Any] | None:
    import torch

    from training.data.dataset import PseudoLabelDataset
    from training.train import train
    from training.trainer.distributed import init_distributed, is_main_process

    torch.set_num_threads(run.threads)
    with init_distributed(run.device):
        report = train(PseudoLabelDataset(labels, run.photos), run, config, backbone_weights)
        return asdict(report) if is_main_process() else None


def self_train(
    run: Path,
    labels: Path,
    /,
    *,
    out: Path | None = None,
    features: Path | None = None,
    photos: Path | None = None,
    threads: PositiveInt = 2,
    config: Annotated[SelfTrainingConfig, _FLAT] = _SELF_TRAINING,
) -> dict[str, Any]:
    """Make new pseudo-labels with a mask transformer, for the photos it was trained on: a round of self-training.

    Fails if the predictions are less consistent under mirroring and cropping than those of the previous round. Train
    the next run on the new labels with `useg train --init-weights`.

    Parameters
    ----------
    run
        Run of a mask transformer.
    labels
        Pseudo-labels that the run was trained on.
    out
        Folder of the new pseudo-labels (default: only measure the consistency).
    features
        Folder of the feature cache (default: LABELS/features).
    photos
        Folder of the labeled photos, if they have moved since.
    threads
        CPU threads.
    """
    import torch

    from training.data.dataset import PseudoLabelDataset
    from training.self_training.rounds import relabel

    torch.set_num_threads(threads)
    dataset = PseudoLabelDataset(labels, photos)
    new_labels = PseudoLabelDataset(out) if out else None
    return asdict(relabel(run, dataset, features or dataset.features, new_labels, config))


def finetune(
    source: Path,
    /,
    *,
    dataset: Annotated[DatasetSpec, _FLAT],
    fraction: PositiveFloat,
    out: Path,
    encoder: str | None = None,
    features: Path | None = None,
    preset: MaskTransformerPreset = "cpu",
    max_steps: PositiveInt | None = None,
    batch_size: PositiveInt | None = None,
    learning_rate: PositiveFloat | None = None,
    seed: NonNegativeInt | None = None,
    threads: PositiveInt = 2,
) -> dict[str, Any]:
    """Fine-tune a run or an artifact on the categories of a labelled dataset.

    Writes a run, and a mapping of its clusters to the categories for `useg eval --mapping`. The images that it is
    trained on are recorded there and cannot be used for evaluation.

    Parameters
    ----------
    source
        Run or artifact of a mask transformer.
    fraction
        Fraction of the images to train on, for example 0.01.
    out
        Folder of the run.
    encoder
        Path or URL of the encoder weights, or `bundled`; required for an artifact, while a run contains them.
    features
        Folder of the feature cache (default: OUT/annotations/features).
    preset
        Training options, see `useg train`.
    max_steps
        Optimizer steps (default: the published number for the fraction).
    batch_size
        Images per step (default: the preset's).
    learning_rate
        Peak learning rate (default: the preset's).
    seed
        Seed of the choice of images, of initialization and augmentation (default: 0).
    threads
        CPU threads.
    """
    import torch

    from training.data.encoders import fetch_encoder
    from training.train import finetune

    torch.set_num_threads(threads)
    options = {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    config = replace(finetune_config(fraction, MASK_TRANSFORMER_PRESETS[preset]), **given)
    encoder_file = fetch_encoder(encoder) if encoder else None
    return asdict(finetune(source, dataset.read(), fraction, out, config, features, encoder_file))
