"""Masks for every photo of a folder, by whatever the configuration says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from model.network.vit import VisionTransformer
from model.pixels import resize_map
from training.features import FeatureCache, finish_tokens
from training.labels.clusters.photo_view import PhotoView
from training.labels.clusters.views import TokenViews, fit_views
from training.labels.masks.discover import CutPlan, propose
from training.labels.masks.discovery_recipe import DiscoveryConfig
from training.labels.masks.proposals import Proposals, rank
from training.labels.masks.vote import vote
from training.photos import PhotoFile
from training.progress import show

_SAMPLED_TOKENS = 200_000


@dataclass(frozen=True, kw_only=True)
class Finder:
    """What finds masks on the patches that show a photo."""

    config: DiscoveryConfig
    encoder: VisionTransformer
    keys: FeatureCache | None = None
    """Filled, if keys are what is cut."""
    views: TokenViews | None = None
    """Fitted, if there is a vote."""

    def find(self, view: PhotoView) -> Proposals:
        """Raises LabelStoreError if the features are missing or not finite."""
        config = self.config
        plan = CutPlan(
            cuts=config.cuts, threshold=config.threshold, is_centred=config.centred, is_faithful=config.faithful
        )
        tokens = _finish(self.encoder, view)
        if self.views is not None:
            return vote(tokens, self.views.look(tokens))
        if self.keys is None:
            return rank(propose(tokens, plan))
        found = rank(propose(np.asarray(self.keys.read(view.photo.digest)[0]), plan))
        # The keys saw the photo stretched to a square: the masks are laid on the patches that show it.
        laid = [resize_map(mask, *tokens.shape[:2]) for mask in found.soft]
        return Proposals(soft=np.array(laid, np.float32).reshape(-1, *tokens.shape[:2]), scores=found.scores)


def sample_views(
    photos: Sequence[PhotoFile], open_view: Callable[[PhotoFile], PhotoView], encoder: VisionTransformer, seed: int
) -> TokenViews:
    """Views of the tokens, fitted on as many of each photo."""
    generator = np.random.default_rng(seed)
    share = max(1, _SAMPLED_TOKENS // len(photos))
    sample = []
    for photo in show(photos, "views"):
        tokens = _finish(encoder, open_view(photo))
        flat = tokens.reshape(-1, tokens.shape[-1])
        sample.append(flat[generator.permutation(len(flat))[:share]])
    return fit_views(np.concatenate(sample))


def find_salient(encoder: VisionTransformer, view: PhotoView) -> Bool[np.ndarray, "h w"]:
    """The patches in any of MaskCut's masks."""
    masks = propose(_finish(encoder, view), CutPlan())
    inside: Bool[np.ndarray, "h w"] = np.logical_or.reduce(masks, axis=0)
    return inside


def _finish(encoder: VisionTransformer, view: PhotoView) -> Float[np.ndarray, "h w C"]:
    return view.cut(finish_tokens(encoder, view.maps))
