"""Reading labeled datasets: a tiny copy of each published layout, drawn by hand."""

from pathlib import Path

import labeled_datasets as drawn
import numpy as np
import pytest
from pycocotools import mask as coco

from model.errors import ConfigError, DatasetError
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import crop_center
from training.evaluation.datasets.taxonomy import COCO_STUFF_27

COCO_CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1},
    {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 18, "name": "dog", "supercategory": "animal", "isthing": 1},
    {"id": 171, "name": "wall-brick", "supercategory": "wall", "isthing": 0},
    {"id": 177, "name": "wall-wood", "supercategory": "wall", "isthing": 0},
]


def draw_coco_panoptic(folder: Path) -> Path:
    drawn.write_photo(folder / "val2017" / "000000000009.jpg")
    drawn.write_panoptic_png(
        folder / "annotations" / "panoptic_val2017" / "000000000009.png", drawn.three_regions(70, 800, bottom=9000)
    )
    segments = [
        {"id": 70, "category_id": 18, "iscrowd": 0},
        {"id": 800, "category_id": 17, "iscrowd": 1},
        {"id": 9000, "category_id": 177, "iscrowd": 0},
    ]
    annotation = {"image_id": 9, "file_name": "000000000009.png", "segments_info": segments}
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [annotation],
        "categories": COCO_CATEGORIES,
    }
    drawn.write_json(folder / "annotations" / "panoptic_val2017.json", content)
    return folder


def test_coco_panoptic_has_supercategories_or_every_thing_by_itself(tmp_path: Path) -> None:
    folder = draw_coco_panoptic(tmp_path)
    dataset = DatasetSpec(folder=folder, format="coco").read()
    assert (dataset.kind, dataset.taxonomy.names, dataset.taxonomy.num_things) == (
        "panoptic",
        ("animal", "person", "wall"),
        2,
    )
    labels = dataset.images[0].annotation.read(4, 6)
    assert labels.segments == {70: 0, 800: 0, 9000: 2}
    assert labels.crowds == {800}
    assert [(each.category, each.area, each.is_crowd, each.bbox) for each in labels.objects] == [
        (0, 6.0, False, (0.0, 0.0, 3.0, 2.0)),
        (0, 6.0, True, (3.0, 0.0, 3.0, 2.0)),
    ]
    fine = DatasetSpec(folder=folder, format="coco", classes="things-and-supercategories").read()
    assert (fine.taxonomy.names, fine.taxonomy.num_things) == (("person", "cat", "dog", "wall"), 3)
    assert fine.images[0].annotation.read(4, 6).segments == {70: 2, 800: 1, 9000: 3}


def test_coco_instances_are_read_from_polygons_and_rle_and_an_image_may_have_none(tmp_path: Path) -> None:
    for number in (3, 5):
        drawn.write_photo(tmp_path / "val2017" / f"{number}.jpg", seed=number)
    polygon = {"id": 1, "image_id": 5, "category_id": 17, "iscrowd": 0, "segmentation": [[0, 0, 3, 0, 3, 2, 0, 2]],
               "area": 5.5, "bbox": [0, 0, 3, 2]}  # fmt: skip
    counts = {
        "id": 2,
        "image_id": 5,
        "category_id": 1,
        "iscrowd": 1,
        "segmentation": {"size": [4, 6], "counts": [20, 4]},
    }
    content = {
        "images": [{"id": 5, "file_name": "5.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [polygon, counts],
        "categories": COCO_CATEGORIES[:3],
    }
    drawn.write_json(tmp_path / "annotations" / "instances_val2017.json", content)
    dataset = DatasetSpec(folder=tmp_path, format="coco-instances").read()
    assert (dataset.kind, dataset.taxonomy.names, [each.image_id for each in dataset.images]) == (
        "masks", ("person", "cat", "dog"), [3, 5],
    )  # fmt: skip
    assert dataset.images[0].annotation.read(4, 6).objects == ()
    first, second = dataset.images[1].annotation.read(4, 6).objects
    assert (first.category, first.area, first.bbox, coco.area(first.rle)) == (1, 5.5, (0, 0, 3, 2), 6)
    # 20 pixels down the first five columns of four are empty: the last column remains.
    assert (second.category, second.area, second.bbox, second.is_crowd) == (0, 4.0, (5.0, 0.0, 1.0, 4.0), True)


def test_coco_stuff_is_mapped_to_27_classes_and_cropped(tmp_path: Path) -> None:
    drawn.write_photo(tmp_path / "images" / "val2017" / "1.jpg")
    drawn.write_label_png(tmp_path / "annotations" / "val2017" / "1.png", drawn.three_regions(0, 181, bottom=255))
    dataset = DatasetSpec(folder=tmp_path, format="coco-stuff").read()
    assert (dataset.kind, len(dataset.taxonomy.names), dataset.taxonomy.num_things, dataset.crop_px) == (
        "semantic",
        27,
        12,
        320,
    )
    labels = dataset.images[0].annotation.read(4, 6)
    assert {dataset.taxonomy.names[index] for index in labels.segments.values()} == {"person", "solid"}
    assert labels.label_map is not None
    assert labels.label_map.tolist() == [[10, 10, 10, 25, 25, 25]] * 2 + [[0] * 6] * 2


def test_each_of_the_182_values_of_coco_stuff_has_one_of_the_27_classes() -> None:
    assert sorted(COCO_STUFF_27.source_to_index) == list(range(182))


def test_the_center_crop_follows_the_scaling_of_the_shorter_side() -> None:
    plane = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
    assert crop_center(plane, 2).tolist() == [[2, 3], [6, 7]]
    assert crop_center(plane, 4).tolist() == [[2, 2, 3, 3]] * 2 + [[6, 6, 7, 7]] * 2


def test_cityscapes_things_without_an_instance_number_are_crowds(tmp_path: Path) -> None:
    drawn.write_photo(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    plane = drawn.three_regions(26_001, 26, bottom=7)
    plane[3, :3] = 29  # caravan: not evaluated
    drawn.write_label_png(tmp_path / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_instanceIds.png", plane)
    dataset = DatasetSpec(folder=tmp_path, format="cityscapes").read()
    assert (len(dataset.taxonomy.names), dataset.taxonomy.num_things, dataset.taxonomy.names[8]) == (19, 8, "road")
    labels = dataset.images[0].annotation.read(4, 6)
    assert labels.segments == {7: 8, 26: 2, 26_001: 2}
    assert labels.crowds == {26}
    assert [(each.area, each.is_crowd) for each in labels.objects] == [(6.0, True), (6.0, False)]


def test_voc_masks_take_their_class_from_the_class_png_and_exclude_the_border(tmp_path: Path) -> None:
    drawn.write_photo(tmp_path / "JPEGImages" / "2007_000032.jpg")
    objects = drawn.three_regions(1, 2, bottom=0)
    objects[0, 2] = 255
    classes = np.where(objects == 1, 8, np.where(objects == 2, 15, objects))
    drawn.write_palette_png(tmp_path / "SegmentationObject" / "2007_000032.png", objects)
    drawn.write_palette_png(tmp_path / "SegmentationClass" / "2007_000032.png", classes)
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000032\n")
    dataset = DatasetSpec(folder=tmp_path, format="voc-masks").read()
    found = dataset.images[0].annotation.read(4, 6).objects
    assert [(dataset.taxonomy.names[each.category], each.area) for each in found] == [("cat", 5.0), ("person", 6.0)]


VOC_XML = """<annotation><object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>3</xmax><ymax>4</ymax></bndbox></object><object><name>person</name><difficult>1</difficult><bndbox><xmin>4</xmin>
<ymin>1</ymin><xmax>4</xmax><ymax>1</ymax></bndbox></object></annotation>"""


def draw_voc_boxes(folder: Path, xml: str) -> Path:
    drawn.write_photo(folder / "JPEGImages" / "000005.jpg")
    for name, content in (("Annotations/000005.xml", xml), ("ImageSets/Main/trainval.txt", "000005\n")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_voc_boxes_include_both_corners_and_difficult_objects_are_crowds(tmp_path: Path) -> None:
    dataset = DatasetSpec(folder=draw_voc_boxes(tmp_path, VOC_XML), format="voc-boxes", split="trainval").read()
    assert dataset.kind == "boxes"
    dog, person = dataset.images[0].annotation.read(4, 6).objects
    assert (dog.bbox, dog.area, dog.is_crowd, dog.rle) == ((0.0, 1.0, 3.0, 3.0), 9.0, False, None)
    assert (person.bbox, person.is_crowd) == ((3.0, 0.0, 1.0, 1.0), True)


@pytest.mark.parametrize("format", ["coco", "coco-instances", "coco-stuff", "cityscapes", "voc-masks"])
def test_a_folder_in_another_format_is_rejected_with_its_name(tmp_path: Path, format: str) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        DatasetSpec(folder=tmp_path, format=format).read()


def test_options_that_do_not_apply_to_a_format_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no splits, got 'val'"):
        DatasetSpec(folder=tmp_path, format="panoptic", split="val")
    with pytest.raises(ConfigError, match="has fixed classes"):
        DatasetSpec(folder=tmp_path, format="cityscapes", classes="things-and-supercategories")
