"""Taxonomies: the categories of a labeled dataset, and how the dataset's own ids map to them."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from model.errors import DatasetError

ClassGrouping = Literal["supercategories", "things-and-supercategories"]
"""Classes of a dataset in COCO's panoptic format: things and stuff by supercategory (COCO: 12 and 15), or every thing
category by itself and stuff by supercategory (COCO: 80 and 15, the panoptic classes of U2Seg)."""


@dataclass(frozen=True, kw_only=True)
class Taxonomy:
    """Named categories, things first. A category index is a position in `names`."""

    title: str
    names: tuple[str, ...]
    num_things: int
    """The first `num_things` of `names` are things."""
    source_to_index: dict[int, int]
    """Category index by the dataset's own category id; ids that are not listed are void."""
    groups: tuple[str, ...] = ()
    """Supercategory of each of `names`, where the dataset has them and `names` are not supercategories already."""

    def is_thing(self, index: int) -> bool:
        return index < self.num_things


@dataclass(frozen=True, kw_only=True)
class CocoCategory:
    """A category as a COCO file lists it."""

    id: StrictInt
    name: Annotated[StrictStr, Field(min_length=1)]
    supercategory: str | None = None
    isthing: bool | None = None

    @property
    def group(self) -> str:
        """The supercategory; of a category without one, the category itself."""
        return self.supercategory or self.name


def build_taxonomy(categories: Iterable[CocoCategory], grouping: ClassGrouping) -> Taxonomy:
    """Return the taxonomy of `categories` in COCO's panoptic format. Raises DatasetError if one has no `isthing`."""
    keys: dict[int, tuple[bool, int, str]] = {}
    for category in categories:
        if category.isthing is None:
            raise DatasetError(f"the category {category.name!r} needs isthing, 0 or 1, in COCO's panoptic format")
        if category.isthing and grouping == "things-and-supercategories":
            keys[category.id] = (False, category.id, category.name)
        else:
            keys[category.id] = (not category.isthing, 0, category.group)
    order = sorted(set(keys.values()))
    num_things = sum(not is_stuff for is_stuff, _, _ in order)
    return Taxonomy(
        title=f"{len(order)} classes ({num_things} things, {len(order) - num_things} stuff)",
        names=tuple(name for _, _, name in order),
        num_things=num_things,
        source_to_index={source: order.index(key) for source, key in keys.items()},
    )


def build_thing_taxonomy(categories: Iterable[CocoCategory]) -> Taxonomy:
    """Return the taxonomy of an instance dataset."""
    ordered = sorted(categories, key=attrgetter("id"))
    return Taxonomy(
        title=f"{len(ordered)} things",
        names=tuple(category.name for category in ordered),
        num_things=len(ordered),
        source_to_index={category.id: index for index, category in enumerate(ordered)},
        groups=tuple(category.group for category in ordered),
    )


_CITYSCAPES_THINGS = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_CITYSCAPES_STUFF = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
}  # fmt: skip
CITYSCAPES = Taxonomy(
    title="Cityscapes, 19 classes (8 things, 11 stuff)",
    names=(*_CITYSCAPES_THINGS.values(), *_CITYSCAPES_STUFF.values()),
    num_things=len(_CITYSCAPES_THINGS),
    source_to_index={source: index for index, source in enumerate([*_CITYSCAPES_THINGS, *_CITYSCAPES_STUFF])},
)
"""Source ids are Cityscapes' label ids; other ids are not evaluated (cityscapesScripts, helpers/labels.py)."""

_VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC = Taxonomy(
    title="PASCAL VOC, 20 things",
    names=_VOC_NAMES,
    num_things=len(_VOC_NAMES),
    source_to_index={source: source - 1 for source in range(1, len(_VOC_NAMES) + 1)},
)
"""Source ids are the palette indices of `SegmentationClass`; 0 is background and 255 the border."""

_COCO_STUFF_27: dict[str, tuple[int, ...]] = {
    "electronic": (*range(71, 77),),
    "appliance": (*range(77, 83),),
    "food": (*range(51, 61),),
    "furniture": (*range(61, 71),),
    "indoor": (*range(83, 91),),
    "kitchen": (*range(43, 51),),
    "accessory": (*range(25, 33),),
    "animal": (*range(15, 25),),
    "outdoor": (*range(9, 15),),
    "person": (0,),
    "sports": (*range(33, 43),),
    "vehicle": (*range(1, 9),),
    "ceiling": (101, 102),
    "floor": (100, *range(113, 118)),
    "food-stuff": (120, 121, 152, 169),
    "furniture-stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw-material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": (*range(170, 177),),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}
COCO_STUFF_27 = Taxonomy(
    title="COCO-Stuff, 27 classes (12 things, 15 stuff)",
    names=tuple(_COCO_STUFF_27),
    num_things=12,
    source_to_index={source: index for index, sources in enumerate(_COCO_STUFF_27.values()) for source in sources},
)
"""Source ids are the pixel values of COCO-Stuff-164k, 0..181; 255 is void (STEGO, src/data.py)."""
