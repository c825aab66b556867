"""How a run is fine-tuned, by the share of a labelled set; free of heavy imports, for the command line."""

from dataclasses import replace

from training.fitting.transformer.recipe import FitConfig

PUBLISHED_STEPS = {
    0.01: 3600, 0.02: 3600, 0.05: 4500, 0.1: 9000, 0.2: 18_000, 0.3: 27_000, 0.4: 36_000, 0.5: 45_000,
}  # fmt: skip
"""Iterations of 16 pictures for a share of COCO train2017 (U2Seg_eff, COCO-PanopticSegmentation/efficiency_*)."""


def plan_finetune(fraction: float, recipe: FitConfig) -> FitConfig:
    """The recipe with the published number of steps of the next larger share; beyond the half, that of the half.

    Unlike there the learning rate falls as a cosine, as in the fit before. Labels of people are sure and whole.
    """
    recipe = replace(recipe, targets="merged", doubt=0.0, drops_unknown=False, embeds=False)
    listed = min((share for share in PUBLISHED_STEPS if share >= fraction), default=max(PUBLISHED_STEPS))
    return replace(recipe, steps=PUBLISHED_STEPS[listed])
