"""The paper's network, taught by the whole masks and the stuff of a label store."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD

from model.errors import CheckpointError
from model.files import hash_file
from model.network.cascade_shape import CascadeShape
from model.network.panoptic_cascade import CascadeLimits, PanopticCascade, prepare
from model.network.pyramid import SIDE_MULTIPLE_PX, Pyramid
from model.network.simple_pyramid import PATCH_STRIDE_PX, SimplePyramid
from model.run import RunCard
from model.weights.backbones import load_resnet
from model.weights.checkpoints import DEFAULT_CACHE, State, describe_encoder, fetch, infer_stored_shape, load_exactly
from model.weights.checkpoints import read_encoder as read_encoder_state
from training.features import open_cache
from training.fitting.cascade.augment import Laid, lay_out, paste_across
from training.fitting.cascade.batch_statistics import measure_statistics
from training.fitting.cascade.data import CascadeBatch, CascadeSamples
from training.fitting.cascade.losses import CascadeLosses, compute_losses
from training.fitting.cascade.recipe import CascadeRecipe
from training.fitting.cascade.start import initialise
from training.fitting.loop.sources import describe_sources
from training.labels.store import LabelConfig, LabelStore


class CascadeTrainee:
    """See `training.fitting.loop.trainer.Trainee`."""

    def __init__(self, store: LabelStore, features: Path, recipe: CascadeRecipe, weights: str = "") -> None:
        """`weights`: a published ResNet-50's, by path or URL; a ViT is the encoder that the labels were made with.

        Raises CheckpointError if the weights do not fit, or the encoder has changed.
        """
        self.recipe = recipe
        labels, photos = store.read_config(), store.read_photos()
        self._samples = CascadeSamples(
            photos=photos,
            masks=store.read_masks(),
            cache=open_cache(features, labels.encoder_hash, labels.side_px),
            thing_clusters=labels.thing_clusters,
            recipe=recipe,
        )
        state = read_encoder(labels) if recipe.backbone == "vit" else None
        shape = plan_shape(recipe, labels, state)
        torch.manual_seed(recipe.seed)
        self.module = PanopticCascade(shape, CascadeLimits())
        initialise(self.module)
        provenance = describe_sources(labels, len(photos))
        match self.module.backbone:
            case SimplePyramid() as pyramid if state is not None:
                load_exactly(pyramid.net, state)
                pyramid.net.requires_grad_(False)
            case Pyramid() as pyramid if weights:
                path = fetch(weights, DEFAULT_CACHE)
                load_exactly(pyramid.bottom_up, load_resnet(str(path)))
                digest = hash_file(path)
                provenance["backbone"] = {"sha256": digest, "origin": describe_encoder(digest)}
        self.card = RunCard(
            network="panoptic_cascade",
            shape=shape,
            step=0,
            side_px=plan_side(recipe, labels, shape),
            provenance=provenance,
            fit=asdict(recipe),
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
        levels = look(self.module, laid)
        generator = torch.Generator(laid.inputs.device).manual_seed(int(draws.integers(2**62)))
        return compute_losses(self.module, levels, laid.sizes, laid.objects, self.recipe, generator)

    def finish(self, module: nn.Module) -> None:
        """Batch norms get the statistics that belong to the last weights."""
        assert isinstance(module, PanopticCascade), "it is what this trains"
        device = next(module.parameters()).device

        def see(number: int) -> None:
            batch = self.read(number * self.recipe.batch, self.recipe.batch)
            laid = self._lay_out(batch, np.random.default_rng((self.recipe.seed, number)))
            module.backbone(prepare(laid.inputs.to(device), laid.sizes.to(device)))

        measure_statistics(module, see, self.recipe.precise_batches)

    def _lay_out(self, batch: CascadeBatch, draws: np.random.Generator) -> Laid:
        pasted = paste_across(batch.examples, self.recipe.pasting, self.recipe.paste_ratio, draws)
        return lay_out(pasted, SIDE_MULTIPLE_PX)


def look(network: PanopticCascade, laid: Laid) -> tuple[Float[Tensor, "B C h w"], ...]:
    """p2 to p6 of pixels, or of what the encoder's last block made of them; a ViT hears no gradient."""
    match network.backbone:
        case SimplePyramid() as pyramid:
            with torch.no_grad():
                if laid.inputs.dtype == torch.uint8:
                    maps = pyramid.encode(prepare(laid.inputs, laid.sizes))
                else:
                    maps = pyramid.net.norm(laid.inputs.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return pyramid.spread(maps)
        case Pyramid() as pyramid:
            return pyramid(prepare(laid.inputs, laid.sizes))  # type: ignore[no-any-return]


def plan_shape(recipe: CascadeRecipe, labels: LabelConfig, encoder: State | None) -> CascadeShape:
    """The recipe's widths for the store's clusters."""
    return CascadeShape(
        thing_clusters=1 if recipe.is_agnostic else labels.thing_clusters,
        stuff_clusters=0 if recipe.is_agnostic else labels.stuff_clusters,
        backbone=recipe.backbone,
        encoder=infer_stored_shape(encoder) if encoder is not None else None,
        stem_width=recipe.stem_width,
        inner_width=recipe.inner_width,
        outer_width=recipe.outer_width,
        pyramid_width=recipe.pyramid_width,
        box_width=recipe.box_width,
        mask_width=recipe.mask_width,
        is_mask_agnostic=recipe.is_mask_agnostic,
        semantic_width=recipe.semantic_width,
    )


def plan_side(recipe: CascadeRecipe, labels: LabelConfig, shape: CascadeShape) -> int:
    """The recipe's square, or that of cached features: so many patches, rounded up for the pyramid."""
    if recipe.inputs == "pixels" or shape.encoder is None:
        return recipe.side_px
    side = labels.side_px // shape.encoder.patch_px * PATCH_STRIDE_PX
    return -(-side // SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX


def read_encoder(labels: LabelConfig) -> State:
    """The weights that the labels were made with. Raises CheckpointError if the file has changed."""
    path = fetch(labels.encoder, DEFAULT_CACHE)
    if hash_file(path) != labels.encoder_hash:
        raise CheckpointError(f"{path} is not the encoder that the labels were made with")
    return read_encoder_state(path)


def schedule(step: int, recipe: CascadeRecipe) -> float:
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
