"""The categories that a labelled set is scored with, and what each data set's own numbers become among them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.choices import ClassGrouping


@dataclass(frozen=True, kw_only=True)
class Taxonomy:
    """Named categories, things first."""

    title: str
    names: tuple[str, ...]
    things: int
    """The first so many of `names` are things."""
    index: dict[int, int]
    """The data set's own category number to a place in `names`; numbers that it lacks are void."""
    groups: tuple[str, ...] = ()
    """The supercategory of each of `names`, where the set gives them and they are not the names."""

    def is_thing(self, place: int) -> bool:
        return place < self.things


def build_taxonomy(categories: Iterable[dict[str, Any]], protocol: ClassGrouping) -> Taxonomy:
    """Categories in the words of COCO's panoptic JSON, as the protocol takes them.

    `supercategories`: things and stuff by supercategory (COCO: 12 and 15). `things-and-supercategories`: every thing
    by itself and stuff by supercategory (COCO: 80 and 15, U2Seg's panoptic classes).
    """
    keys: dict[int, tuple[bool, int, str]] = {}
    for each in categories:
        group = each.get("supercategory") or each["name"]
        if each["isthing"] and protocol == "things-and-supercategories":
            keys[each["id"]] = (False, each["id"], each["name"])
        else:
            keys[each["id"]] = (not each["isthing"], 0, group)
    order = sorted(set(keys.values()))
    things = sum(not is_stuff for is_stuff, _, _ in order)
    return Taxonomy(
        title=f"{len(order)} classes ({things} things, {len(order) - things} stuff)",
        names=tuple(name for _, _, name in order),
        things=things,
        index={number: order.index(key) for number, key in keys.items()},
    )


def build_thing_taxonomy(categories: Iterable[dict[str, Any]], *, without: tuple[str, ...] = ()) -> Taxonomy:
    """Categories of an instance set, each by itself; those whose name begins with one of `without` are left out."""
    kept = sorted(
        (each["id"], each["name"], each.get("supercategory") or each["name"])
        for each in categories
        if not each["name"].lower().startswith(without)
    )
    return Taxonomy(
        title=f"{len(kept)} things",
        names=tuple(name for _, name, _ in kept),
        things=len(kept),
        index={number: place for place, (number, _, _) in enumerate(kept)},
        groups=tuple(group for _, _, group in kept),
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
    things=len(_CITYSCAPES_THINGS),
    index={number: place for place, number in enumerate([*_CITYSCAPES_THINGS, *_CITYSCAPES_STUFF])},
)
"""By label id; the other ids are not evaluated (cityscapesScripts, helpers/labels.py)."""

_VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC = Taxonomy(
    title="PASCAL VOC, 20 things",
    names=_VOC_NAMES,
    things=len(_VOC_NAMES),
    index={number: number - 1 for number in range(1, len(_VOC_NAMES) + 1)},
)
"""By the colour index of the class pictures; 0 is background and 255 the border."""

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
    things=12,
    index={number: place for place, numbers in enumerate(_COCO_STUFF_27.values()) for number in numbers},
)
"""By the values of COCO-Stuff-164k's pictures, 0..181; 255 is void (STEGO, src/data.py)."""
