"""The words that commands and reports take for layouts, classes, methods and rules."""

from typing import Literal, get_args

ProposalMethod = Literal["maskcut", "vote", "detector", "annotations"]
"""Where object masks come from: found in features, by a trained network, or (for fine-tuning alone) by people."""
PROPOSAL_METHODS: tuple[ProposalMethod, ...] = get_args(ProposalMethod)

MaskCutFeatures = Literal["patches", "keys"]
"""What MaskCut cuts: the encoder's output, or the keys of its last attention on the photo stretched to a square."""
MASKCUT_FEATURES: tuple[MaskCutFeatures, ...] = get_args(MaskCutFeatures)

RefinementMethod = Literal["guided", "crf"]
"""How masks find the borders in the picture."""
REFINEMENT_METHODS: tuple[RefinementMethod, ...] = get_args(RefinementMethod)

StuffMergeRule = Literal["published", "improved"]
"""How masks and stuff become one map, see training/data/panoptic_labels.py."""
STUFF_MERGE_RULES: tuple[StuffMergeRule, ...] = get_args(StuffMergeRule)
