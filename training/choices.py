"""The words that commands and reports take for layouts, classes, methods and rules."""

from typing import Literal, get_args

Layout = Literal[
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
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Protocol = Literal["supercategories", "things-and-supercategories"]
"""The classes of a set in COCO's panoptic format: on COCO 12 and 15, or 80 and 15."""
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

Method = Literal["majority", "assignment", "cups", "votes"]
"""How clusters are matched with categories, see training/scores/meetings/matching.py."""
METHODS: tuple[Method, ...] = get_args(Method)

NamingMethod = Literal[Method, "prototypes", "given"]
"""How names came about: matched, from the likeness of labelled regions, or because clusters are categories."""
NAMING_METHODS: tuple[NamingMethod, ...] = get_args(NamingMethod)

Proposals = Literal["maskcut", "vote", "detector", "annotations"]
"""Where object masks come from: found in features, by a trained network, or (for fine-tuning alone) by people."""
PROPOSALS: tuple[Proposals, ...] = get_args(Proposals)

Tokens = Literal["patches", "keys"]
"""What MaskCut cuts: the encoder's output, or the keys of its last attention on the photo stretched to a square."""
TOKENS: tuple[Tokens, ...] = get_args(Tokens)

Refinement = Literal["guided", "crf"]
"""How masks find the borders in the picture."""
REFINEMENTS: tuple[Refinement, ...] = get_args(Refinement)

MergeRule = Literal["published", "improved"]
"""How masks and stuff become one map, see training/labels/merge.py."""
MERGE_RULES: tuple[MergeRule, ...] = get_args(MergeRule)
