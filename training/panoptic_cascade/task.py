"""The paper's network, taught by the whole masks and the stuff of a label store."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD

from model.checkpoints.dino import describe_encoder_origin, infer_stored_encoder_config, load_resnet_state_dict
from model.checkpoints.dino import read_encoder_state_dict as read_encoder_state
from model.checkpoints.runs import RunInfo
from model.checkpoints.state_dicts import DEFAULT_CACHE, StateDict, fetch_file, load_strictly
from model.errors import CheckpointError
from model.files import hash_file
from model.networks.fpn import FPN, PATCH_STRIDE_PX, SIDE_MULTIPLE_PX, SimpleFPN
from model.networks.interface import normalize_and_mask
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.resnet import NormedConv
from model.networks.roi_heads import BoxHead, BoxPredictor, MaskHead
from model.networks.rpn import RPNHead
from training.data.dataset import PseudoLabelDataset
from training.data.features import open_cache
from training.data.label_config import PseudoLabelConfig
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.dataset import CascadeBatch, CascadeDataset, PaddedBatch, copy_paste_batch, pad_to_batch
from training.panoptic_cascade.losses import CascadeLosses, compute_losses
from training.trainer.provenance import make_provenance


class CascadeTask:
    """See `training.trainer.trainer.Trainee`."""

    def __init__(
        self, store: PseudoLabelDataset, features: Path, recipe: CascadeTrainConfig, weights: str = ""
    ) -> None:
        """`weights`: a published ResNet-50's, by path or URL; a ViT is the encoder that the labels were made with.

        Raises CheckpointError if the weights do not fit, or the encoder has changed.
        """
        self.recipe = recipe
        labels, photos = store.read_config(), store.read_photos()
        self._samples = CascadeDataset(
            photos=photos,
            masks=store.read_instances(),
            cache=open_cache(features, labels.encoder_hash, labels.side_px),
            thing_clusters=labels.thing_clusters,
            recipe=recipe,
        )
        state = read_encoder(labels) if recipe.backbone == "vit" else None
        shape = plan_shape(recipe, labels, state)
        torch.manual_seed(recipe.seed)
        self.module = PanopticCascade(shape, CascadeInferenceConfig())
        init_weights(self.module)
        provenance = make_provenance(labels, len(photos))
        match self.module.backbone:
            case SimpleFPN() as pyramid if state is not None:
                load_strictly(pyramid.net, state)
                pyramid.net.requires_grad_(False)
            case FPN() as pyramid if weights:
                path = fetch_file(weights, DEFAULT_CACHE)
                load_strictly(pyramid.bottom_up, load_resnet_state_dict(str(path)))
                digest = hash_file(path)
                provenance["backbone"] = {"sha256": digest, "origin": describe_encoder_origin(digest)}
        self.card = RunInfo(
            network="panoptic_cascade",
            network_config=shape,
            step=0,
            side_px=plan_side(recipe, labels, shape),
            provenance=provenance,
            train_config=asdict(recipe),
        )

    def make_optimiser(self) -> SGD:
        groups = group_parameters(self.module, self.recipe.weight_decay)
        return SGD(groups, lr=self.recipe.learning_rate, momentum=self.recipe.momentum)

    def schedule(self, step: int) -> float:
        return schedule(step, self.recipe)

    def read(self, first: int, count: int) -> CascadeBatch:
        return self._samples.read(first, count)

    def compute_losses(self, batch: CascadeBatch, step: int) -> CascadeLosses:
        draws = np.random.default_rng((self.recipe.seed, step))
        laid = self._lay_out(batch, draws)
        levels = extract_features(self.module, laid)
        generator = torch.Generator(laid.inputs.device).manual_seed(int(draws.integers(2**62)))
        return compute_losses(self.module, levels, laid.sizes, laid.objects, self.recipe, generator)

    def finish(self, module: nn.Module) -> None:
        """Batch norms get the statistics that belong to the last weights."""
        assert isinstance(module, PanopticCascade), "it is what this trains"
        device = next(module.parameters()).device

        def see(number: int) -> None:
            batch = self.read(number * self.recipe.batch, self.recipe.batch)
            laid = self._lay_out(batch, np.random.default_rng((self.recipe.seed, number)))
            module.backbone(normalize_and_mask(laid.inputs.to(device), laid.sizes.to(device)))

        recompute_bn_stats(module, see, self.recipe.precise_batches)

    def _lay_out(self, batch: CascadeBatch, draws: np.random.Generator) -> PaddedBatch:
        pasted = copy_paste_batch(batch.examples, self.recipe.pasting, self.recipe.paste_ratio, draws)
        return pad_to_batch(pasted, SIDE_MULTIPLE_PX)


def extract_features(network: PanopticCascade, laid: PaddedBatch) -> tuple[Float[Tensor, "B C h w"], ...]:
    """p2 to p6 of pixels, or of what the encoder's last block made of them; a ViT hears no gradient."""
    match network.backbone:
        case SimpleFPN() as pyramid:
            with torch.no_grad():
                if laid.inputs.dtype == torch.uint8:
                    maps = pyramid.encode(normalize_and_mask(laid.inputs, laid.sizes))
                else:
                    maps = pyramid.net.norm(laid.inputs.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return pyramid.make_levels(maps)
        case FPN() as pyramid:
            return pyramid(normalize_and_mask(laid.inputs, laid.sizes))  # type: ignore[no-any-return]


def plan_shape(recipe: CascadeTrainConfig, labels: PseudoLabelConfig, encoder: StateDict | None) -> CascadeConfig:
    """The recipe's widths for the store's clusters."""
    return CascadeConfig(
        thing_clusters=1 if recipe.is_agnostic else labels.thing_clusters,
        stuff_clusters=0 if recipe.is_agnostic else labels.stuff_clusters,
        backbone=recipe.backbone,
        encoder=infer_stored_encoder_config(encoder) if encoder is not None else None,
        stem_out_channels=recipe.stem_out_channels,
        bottleneck_channels=recipe.bottleneck_channels,
        res2_out_channels=recipe.res2_out_channels,
        fpn_channels=recipe.fpn_channels,
        box_fc_dim=recipe.box_fc_dim,
        mask_conv_dim=recipe.mask_conv_dim,
        cls_agnostic_mask=recipe.cls_agnostic_mask,
        sem_seg_conv_dim=recipe.sem_seg_conv_dim,
    )


def plan_side(recipe: CascadeTrainConfig, labels: PseudoLabelConfig, shape: CascadeConfig) -> int:
    """The recipe's square, or that of cached features: so many patches, rounded up for the pyramid."""
    if recipe.inputs == "pixels" or shape.encoder is None:
        return recipe.side_px
    side = labels.side_px // shape.encoder.patch_px * PATCH_STRIDE_PX
    return -(-side // SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX


def read_encoder(labels: PseudoLabelConfig) -> StateDict:
    """The weights that the labels were made with. Raises CheckpointError if the file has changed."""
    path = fetch_file(labels.encoder, DEFAULT_CACHE)
    if hash_file(path) != labels.encoder_hash:
        raise CheckpointError(f"{path} is not the encoder that the labels were made with")
    return read_encoder_state(path)


def schedule(step: int, recipe: CascadeTrainConfig) -> float:
    """The share of the learning rate at a step: a linear rise, times a factor for each milestone that is behind."""
    share = recipe.milestone_factor ** sum(step >= each for each in recipe.milestones)
    if step >= recipe.warm_up_steps:
        return share
    risen = step / recipe.warm_up_steps
    return share * (recipe.warm_up_share * (1.0 - risen) + risen)


def group_parameters(network: PanopticCascade, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for all that is trained but norms."""
    norms: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in network.modules():
        is_norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)
        kept = [each for each in module.parameters(recurse=False) if each.requires_grad]
        (norms if is_norm else others).extend(kept)
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


_CLASS_DEVIATION, _BOX_DEVIATION, _MASK_DEVIATION, _PROPOSAL_DEVIATION = 0.01, 0.001, 0.001, 0.01


def init_weights(network: PanopticCascade) -> None:
    """Draw the weights as detectron2 does; a ViT and the pyramid over it stay as torch drew them, as in ViTDet.

    "MSRA" is He's initialisation by fan-out; Caffe's "Xavier" is uniform by fan-in.
    """
    for module in network.modules():
        match module:
            case RPNHead():
                for convolution in (module.conv, module.objectness_logits, module.anchor_deltas):
                    _draw_normal(convolution, _PROPOSAL_DEVIATION)
            case BoxHead():
                for linear in (module.fc1, module.fc2):
                    _draw_xavier(linear)
            case BoxPredictor():
                _draw_normal(module.cls_score, _CLASS_DEVIATION)
                _draw_normal(module.bbox_pred, _BOX_DEVIATION)
            case MaskHead():
                for child in module.children():
                    _draw_msra(child)
                _draw_normal(module.predictor, _MASK_DEVIATION)
    if isinstance(network.backbone, FPN):
        for layer in network.backbone.bottom_up.modules():
            if isinstance(layer, nn.Conv2d):
                _draw_msra(layer)
        for layer in network.backbone.children():
            if isinstance(layer, NormedConv):
                _draw_xavier(layer)
    if network.config.stuff_clusters:
        for layer in network.sem_seg_head.modules():
            if isinstance(layer, nn.Conv2d):
                _draw_msra(layer)


def _draw_normal(layer: nn.Module, deviation: float) -> None:
    nn.init.normal_(layer.get_parameter("weight"), std=deviation)
    _clear_bias(layer)


def _draw_msra(layer: nn.Module) -> None:
    nn.init.kaiming_normal_(layer.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
    _clear_bias(layer)


def _draw_xavier(layer: nn.Module) -> None:
    nn.init.kaiming_uniform_(layer.get_parameter("weight"), a=1)
    _clear_bias(layer)


def _clear_bias(layer: nn.Module) -> None:
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.get_parameter("bias"))


@torch.no_grad()
def recompute_bn_stats(module: nn.Module, forward: Callable[[int], object], batches: int) -> None:
    """Let each batch norm's running statistics be the mean of those of so many batches.

    PreciseBN ("Rethinking 'Batch' in BatchNorm", section 3.2), with the mean of the variances. `forward` runs the
    module on the batch of a number; without a batch norm it is not called.
    """
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d) and each.training]
    if not norms:
        return
    momenta = [each.momentum for each in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the mean of all batches since the reset
    for number in range(batches):
        forward(number)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
