"""The words that commands and reports take for layouts, classes, methods and rules."""

from typing import Literal, get_args

DatasetFormat = Literal[
    "panoptic",
    "instances",
    "coco",
    "coco-instances",
    "coco-stuff",
    "cityscapes",
    "voc-masks",
    "voc-boxes",
    "uvo",
    "uvo-videos",
]
"""How a labelled set lies in its folder: two layouts of our own, and those in which sets are published."""
DATASET_FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)

ClassGrouping = Literal["supercategories", "things-and-supercategories"]
"""The classes of a set in COCO's panoptic format: on COCO 12 and 15, or 80 and 15."""
CLASS_GROUPINGS: tuple[ClassGrouping, ...] = get_args(ClassGrouping)

MatchingMethod = Literal["majority", "assignment", "cups", "votes"]
"""How clusters are matched with categories, see training/evaluation/matching/cluster_matching.py."""
MATCHING_METHODS: tuple[MatchingMethod, ...] = get_args(MatchingMethod)

MappingMethod = Literal[MatchingMethod, "prototypes", "given"]
"""How names came about: matched, from the likeness of labelled regions, or because clusters are categories."""
MAPPING_METHODS: tuple[MappingMethod, ...] = get_args(MappingMethod)

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
