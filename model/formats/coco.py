"""COCO's panoptic annotations, such that panopticapi's evaluator finds nothing amiss.

Every id in the PNG is in `segments_info`, every id there is in the PNG, and every category is listed.
"""

from typing import Any

from model.contract import Contract
from model.formats.rle import encode_label_map
from model.postprocessing.panoptic import Segmentation


def list_coco_categories(contract: Contract) -> list[dict[str, Any]]:
    """COCO's `categories`: those the contract names, then a number above them all for each cluster without a name."""
    categories: dict[int, dict[str, Any]] = {}
    for cluster in range(1, contract.thing_clusters + contract.stuff_clusters + 1):
        number = get_category_id(cluster, contract)
        named = contract.categories.get(cluster)
        is_thing = int(contract.is_thing(cluster))
        entry = {
            "id": number,
            "name": named.name if named else f"cluster {cluster}",
            "supercategory": "thing" if is_thing else "stuff",
            "isthing": is_thing,
        }
        categories.setdefault(number, entry)
    return [categories[number] for number in sorted(categories)]


def get_category_id(cluster: int, contract: Contract) -> int:
    """The id of a cluster's category, named or not."""
    if named := contract.categories.get(cluster):
        return named.id
    return max((category.id for category in contract.categories.values()), default=0) + cluster


def to_coco_annotation(segmentation: Segmentation, contract: Contract, image_id: int, file_name: str) -> dict[str, Any]:
    """COCO's `annotation` of one PNG; of instances that overlap, what shows of them."""
    shown = encode_label_map(segmentation.label_map, [segment.id for segment in segmentation.segments])
    entries = [
        {
            "id": segment.id,
            "category_id": get_category_id(segment.cluster, contract),
            "iscrowd": 0,
            "isthing": int(segment.is_thing),
            "cluster": segment.cluster,
            "score": round(segment.score, 4),
            "area": outline.area,
            "bbox": list(outline.bbox),
        }
        for segment, outline in zip(segmentation.segments, shown, strict=True)
        if outline.area
    ]
    return {"image_id": image_id, "file_name": file_name, "segments_info": entries}
