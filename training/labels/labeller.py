"""A photo's panoptic pseudo-label, from its features, its masks and the codebook."""

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float

from model.contract import Canvas
from model.network.mask_transformer import STRIDE_PX
from model.pixels import place, read_photo, resize_map
from training.labels.clusters.cluster import assign
from training.labels.clusters.codebook import Codebook
from training.labels.clusters.codebook_fit import Material, open_describer, open_judge, open_stuff
from training.labels.clusters.descriptors import Describer
from training.labels.clusters.stuff import MapStuff, StuffSource
from training.labels.clusters.thingness import Judge
from training.labels.masks.discovery_recipe import MOST_OBJECTS
from training.labels.masks.proposals import separate
from training.labels.masks.refine import refine
from training.labels.merge import list_thing_like, merge
from training.labels.shards import LabelledPhoto
from training.labels.store import LabelConfig
from training.photos import PhotoFile

MOST_MASKS = 40
"""Of a vote, that one photo keeps; a third of them are gone once they were refined."""


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """All that turns a photo into a label."""

    material: Material
    codebook: Codebook
    config: LabelConfig
    judge: Judge | None
    describer: Describer
    stuff: StuffSource
    thing_like: frozenset[int]
    """Stuff clusters that the merge takes for things."""

    @classmethod
    def make(cls, material: Material, codebook: Codebook, config: LabelConfig) -> Self:
        return cls(
            material=material,
            codebook=codebook,
            config=config,
            judge=open_judge(codebook) if config.proposals == "vote" else None,
            describer=open_describer(codebook, material),
            stuff=open_stuff(codebook, material, has_crf=config.stuff_crf),
            thing_like=list_thing_like(codebook.inside, config.most_inside, config.merge),
        )

    @property
    def causes(self) -> dict[str, str | int | float]:
        """What labels depend on, beside the photos."""
        elsewhere = {"photos", "photos_hash", "encoder", "maps", "codebook", "note"}
        causes = {name: value for name, value in asdict(self.config).items() if name not in elsewhere}
        return causes | {"codebook": self.codebook.digest}

    def hash_map(self, photo: PhotoFile) -> str:
        """Of the photo's stuff map, if it comes as a file."""
        return self.stuff.hash_map(photo) if isinstance(self.stuff, MapStuff) else ""

    def label(self, photo: PhotoFile) -> LabelledPhoto:
        """The panoptic pseudo-label of one photo, in its own size."""
        view, config = self.material.view(photo), self.config
        found = self.material.found(view)
        if self.judge is not None:
            found = self.judge.judge(view, found).keep(MOST_MASKS, 0.0)
        square, _ = place(read_photo(photo.path).image, [Canvas.square(config.side_px)], STRIDE_PX)
        height, width = view.placement.size
        placed = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
        fine = refine(found.soft, placed, view.patch_px, config.refinement)
        kept = fine.any((1, 2))
        masks = [resize_map(mask.astype(np.float32), photo.height, photo.width) > 0.5 for mask in fine[kept]]
        stacked = np.array(masks, bool).reshape(len(masks), photo.height, photo.width)
        vectors = self.describer.describe(view, found.hard)[kept]
        clusters = assign(vectors, self.codebook.things, is_spherical=self.describer.is_spherical) + 1
        stuff = self.stuff.label_pixels(view)
        painted = self._choose(stacked, found.scores[kept])
        labelled = merge(painted, clusters.tolist(), stuff, config.thing_clusters, self.thing_like)
        scores = found.scores[kept].tolist()
        return LabelledPhoto(
            labelled=labelled,
            masks=stacked,
            things=clusters.tolist(),
            scores=scores,
            is_painted=[bool(mask.any()) for mask in painted],
        )

    def _choose(self, masks: Bool[np.ndarray, "N H W"], scores: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N H W"]:
        """What of each mask goes into the panoptic map; of a vote's only the likeliest things do, and lie apart."""
        if self.judge is None:
            return masks
        is_thing = scores >= self.codebook.least_scores[self.config.objects - 1]
        is_thing[MOST_OBJECTS:] = False
        return separate(masks & is_thing[:, None, None])
