"""Training task of the panoptic cascade, the paper's network, on whole masks and stuff."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import update_bn

from model.checkpoints.dino import convert_resnet, describe_encoder_origin, read_encoder_state_dict
from model.checkpoints.runs import RunInfo
from model.checkpoints.state_dicts import StateDict, fetch_file, load_strictly
from model.errors import CheckpointError
from model.files import hash_file
from model.networks.backbones import FPN, NormedConv, SimpleFPN
from model.networks.interface import normalize_and_mask
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.roi_heads import BoxHead, BoxPredictor, MaskHead
from model.networks.rpn import RPNHead
from model.networks.vit import infer_encoder_config
from training.data.dataset import PseudoLabelDataset
from training.data.label_config import PseudoLabelConfig
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.dataset import CascadeBatch, CascadeDataset, PaddedBatch, copy_paste_batch, pad_to_batch
from training.panoptic_cascade.losses import panoptic_cascade_losses
from training.trainer.task import Losses, PhotoSampler, TrainingTask, make_provenance

_NORMAL, _NARROW_NORMAL = (partial(nn.init.normal_, std=std) for std in (0.01, 0.001))
_MSRA = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
_XAVIER = partial(nn.init.kaiming_uniform_, a=1)


class CascadeTask(TrainingTask[CascadeBatch]):
    """Trains a panoptic cascade."""

    config: CascadeTrainConfig
    module: PanopticCascade

    def __init__(
        self,
        dataset: PseudoLabelDataset,
        config: CascadeTrainConfig,
        backbone_weights: str = "",
    ) -> None:
        """`backbone_weights` is the path or URL of a published ResNet-50; a ViT is the encoder of the labels.

        Raises CheckpointError if the weights do not match, or if the encoder has changed.
        """
        self.config = config
        labels, photos = dataset.read_config(), dataset.read_photos()
        self._samples = CascadeDataset(
            sampler=PhotoSampler(photos=photos, seed=config.seed),
            instances=dataset.read_instances(),
            thing_clusters=labels.thing_clusters,
            config=config,
        )
        state = load_encoder_state(labels) if config.backbone == "vit" else None
        cascade_config = make_cascade_config(config, labels, state)
        torch.manual_seed(config.seed)
        self.module = PanopticCascade(cascade_config, CascadeInferenceConfig())
        init_weights(self.module)
        provenance = make_provenance(labels, len(photos))
        match self.module.backbone:
            case SimpleFPN() as fpn if state is not None:
                load_strictly(fpn.net, state)
                fpn.net.requires_grad_(False)
            case FPN() as fpn if backbone_weights:
                path = fetch_file(backbone_weights)
                load_strictly(fpn.bottom_up, convert_resnet(read_encoder_state_dict(path)))
                digest = hash_file(path)
                provenance["backbone"] = {"sha256": digest, "origin": describe_encoder_origin(digest)}
        self.run_info = RunInfo(
            network="panoptic_cascade",
            network_config=cascade_config,
            step=0,
            side_px=config.side_px,
            provenance=provenance,
            train_config=asdict(config),
        )

    def make_optimizer(self) -> SGD:
        groups = cascade_param_groups(self.module, self.config.weight_decay)
        return SGD(groups, lr=self.config.learning_rate, momentum=0.9)

    def load_batch(self, first: int, count: int) -> CascadeBatch:
        return self._samples.load_batch(first, count)

    def compute_losses(self, batch: CascadeBatch, step: int) -> Losses:
        rng = np.random.default_rng((self.config.seed, step))
        padded = self._augment(batch, rng)
        levels = self.module.backbone(normalize_and_mask(padded.pixels, padded.sizes))
        generator = torch.Generator(padded.pixels.device).manual_seed(int(rng.integers(2**62)))
        return panoptic_cascade_losses(self.module, levels, padded.sizes, padded.targets, self.config, generator)

    def on_train_end(self, module: nn.Module) -> None:
        """Recompute the batch-norm statistics for the final weights, over `precise_bn_iters` batches.

        PreciseBN ("Rethinking 'Batch' in BatchNorm", section 3.2), with the mean of the variances.
        """
        assert isinstance(module, PanopticCascade), "the module of this task"
        device = next(module.parameters()).device
        update_bn(self._precise_bn_inputs(device), module.backbone)

    def _precise_bn_inputs(self, device: torch.device) -> Iterator[Float[Tensor, "B 3 H W"]]:
        size = self.config.batch_size
        for number in range(self.config.precise_bn_iters):
            batch = self.load_batch(number * size, size)
            padded = self._augment(batch, np.random.default_rng((self.config.seed, number)))
            yield normalize_and_mask(padded.pixels.to(device), padded.sizes.to(device))

    def _augment(self, batch: CascadeBatch, rng: np.random.Generator) -> PaddedBatch:
        pasted = copy_paste_batch(batch.samples, self.config.copy_paste, 0.3, rng)
        return pad_to_batch(pasted, PanopticCascade.side_multiple_px)


def make_cascade_config(
    config: CascadeTrainConfig, labels: PseudoLabelConfig, encoder: StateDict | None
) -> CascadeConfig:
    """Return the network's sizes for the clusters of the labels; options of the same name are copied."""
    shared = {each.name for each in fields(CascadeConfig)} & {each.name for each in fields(config)}
    return CascadeConfig(
        **{name: getattr(config, name) for name in shared},
        thing_clusters=1 if config.cls_agnostic else labels.thing_clusters,
        stuff_clusters=0 if config.cls_agnostic else labels.stuff_clusters,
        encoder=infer_encoder_config(encoder) if encoder is not None else None,
    )


def load_encoder_state(labels: PseudoLabelConfig) -> StateDict:
    """Load the weights of the labels' encoder. Raises CheckpointError if the file has changed."""
    path = fetch_file(labels.encoder)
    if hash_file(path) != labels.encoder_hash:
        raise CheckpointError(f"{path} is not the encoder that the labels were made with")
    return read_encoder_state_dict(path)


def cascade_param_groups(network: PanopticCascade, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters: no weight decay for norms."""
    norms: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in network.modules():
        is_norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)
        trained = [each for each in module.parameters(recurse=False) if each.requires_grad]
        (norms if is_norm else others).extend(trained)
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def init_weights(network: PanopticCascade) -> None:
    """Initialize the weights as detectron2 does; a ViT and its pyramid keep torch's initialization, as in ViTDet.

    "MSRA" is He's initialization by fan-out; Caffe's "Xavier" is uniform by fan-in.
    """
    for module in network.modules():
        match module:
            case RPNHead():
                _init(_NORMAL, module.conv, module.objectness_logits, module.anchor_deltas)
            case BoxHead():
                _init(_XAVIER, module.fc1, module.fc2)
            case BoxPredictor():
                _init(_NORMAL, module.cls_score)
                _init(_NARROW_NORMAL, module.bbox_pred)
            case MaskHead():
                _init(_MSRA, *module.children())
                _init(_NARROW_NORMAL, module.predictor)
    if isinstance(network.backbone, FPN):
        _init(_MSRA, *(each for each in network.backbone.bottom_up.modules() if isinstance(each, nn.Conv2d)))
        _init(_XAVIER, *(each for each in network.backbone.children() if isinstance(each, NormedConv)))
    if network.config.stuff_clusters:
        _init(_MSRA, *(each for each in network.sem_seg_head.modules() if isinstance(each, nn.Conv2d)))


def _init(initialize: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
    """Initialize the weights of layers, and set their biases to zero."""
    for layer in layers:
        initialize(layer.get_parameter("weight"))
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.get_parameter("bias"))
