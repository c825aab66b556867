"""Labeled datasets: COCO files as people have them, and a tiny copy of each published layout."""

from pathlib import Path
from typing import Any

import labeled_datasets as drawn
import numpy as np
import pytest
from pycocotools import mask as coco

from model.errors import ConfigError, DatasetError
from model.formats.coco import parse_counts
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset, crop_center
from training.evaluation.datasets.taxonomy import COCO_STUFF_27

SQUARE = [[0, 0, 3, 0, 3, 2, 0, 2]]
LAST_COLUMN = {"size": [4, 6], "counts": [20, 4]}


def annotate(**changed: Any) -> dict[str, Any]:
    entry = {"id": 1, "image_id": 5, "category_id": 2, "segmentation": SQUARE, "iscrowd": 0, **changed}
    return {name: value for name, value in entry.items() if value != "absent"}


def write_instances(path: Path, *annotations: dict[str, Any], photos: Path | None = None, **changed: Any) -> Path:
    """Write a file with one photo of 4 x 6 pixels, and the photo."""
    content = {
        "images": [{"id": 5, "file_name": "5.png", "height": 4, "width": 6}],
        "annotations": list(annotations),
        "categories": [{"id": 2, "name": "cat"}],
        **changed,
    }
    drawn.write_json(path, content)
    drawn.write_photo((photos or path.parent) / "5.png")
    return path


def read(path: Path, **options: Any) -> GroundTruthDataset:
    return DatasetSpec(folder=path, **options).read()


def read_areas(dataset: GroundTruthDataset) -> list[float]:
    return [each.area for image in dataset.images for each in image.annotation.read(4, 6).objects]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (annotate(segmentation={"size": [4, 6], "counts": [20, 3]}), r"RLE do not add up to 4 x 6 pixels"),
        (annotate(segmentation={"size": [4, 6], "counts": [20, 5]}), r"RLE do not add up"),
        (annotate(segmentation={"size": [4, 6], "counts": [-1, 25]}), r"RLE do not add up"),
        (annotate(segmentation={"size": [4, 6], "counts": "l0"}), r"RLE do not add up"),
        (annotate(segmentation={"size": [4, 6], "counts": "P"}), "not a compressed RLE"),
        (annotate(segmentation={"size": [4, 6], "counts": "\x00 é"}), "annotation 1 of image 5"),
        (annotate(segmentation={"size": [6, 4], "counts": [20, 4]}), r"has the size \[6, 4\], the image \[4, 6\]"),
        (annotate(segmentation={"counts": [20, 4]}), "neither a list of polygons nor an RLE"),
        (annotate(segmentation=SQUARE[0]), "neither a list of polygons nor an RLE"),
        (annotate(segmentation=[["a", 1, 2, 3, 4, 5]]), "could not convert string to float"),
        (annotate(segmentation=[[0, 0, 3, 0, float("nan"), 2]]), "is not finite"),
        (annotate(segmentation=[[0, 0, 3e9, 0, 3, 2]]), "outside the image of 6x4 pixels"),
        (annotate(category_id=93), "category 93 is not listed"),
        (annotate(category_id="absent"), "category None is not listed"),
        (annotate(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\] is not"),
        (annotate(bbox=[1, 2, float("inf"), 4]), "bbox"),
        (annotate(area=float("nan")), "area nan"),
    ],
)
def test_an_invalid_annotation_is_named_before_any_work(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    path = write_instances(tmp_path / "set.json", entry)
    with pytest.raises(DatasetError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}: annotation 1 of image 5: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "skipped"),
    [
        (annotate(id=7, segmentation=[], bbox=[0, 0, 2, 2]), "1 annotations without a mask; the first: annotation 7"),
        (annotate(id=7, segmentation=[[]]), "1 annotations without a mask or a box; the first: annotation 7"),
        (annotate(id=7, segmentation="absent"), "1 annotations without a mask or a box; the first: annotation 7"),
        (annotate(id=7, segmentation=[[0, 0, 3, 0]]), "1 annotations with polygons of fewer than three points"),
        (annotate(id=7, segmentation={"size": [4, 6], "counts": [24]}), "1 annotations with an empty mask"),
        (annotate(id=7, segmentation=[[7, 0, 9, 0, 9, 2]]), "1 annotations cut at the border"),
        (annotate(id=7, image_id=400), "1 annotations of images that are not listed; the first: annotation 7"),
        (annotate(), "1 annotations listed twice; the first: annotation 1"),
    ],
)
def test_what_other_tools_tolerate_is_left_out_counted_and_named(
    tmp_path: Path, entry: dict[str, Any], skipped: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = read(write_instances(tmp_path / "set.json", annotate(), entry))
    assert read_areas(dataset) == [6.0]
    assert skipped in dataset.skipped[0]
    assert skipped in caplog.text


def test_area_box_and_crowd_flag_may_be_absent_and_a_polygon_is_cut_at_the_border(tmp_path: Path) -> None:
    entry = annotate(iscrowd="absent", segmentation=[[-3, 0, 3, 0, 3, 2, -3, 2]])
    dataset = read(write_instances(tmp_path / "set.json", entry))
    (found,) = dataset.images[0].annotation.read(4, 6).objects
    assert (found.area, found.bbox, found.is_crowd) == (6.0, (0.0, 0.0, 3.0, 2.0), False)


def test_a_file_without_any_mask_has_boxes(tmp_path: Path) -> None:
    dataset = read(write_instances(tmp_path / "set.json", annotate(segmentation=[], bbox=[1, 1, 2, 3])))
    assert (dataset.kind, dataset.skipped, read_areas(dataset)) == ("boxes", (), [6.0])


def test_a_file_whose_annotations_are_all_left_out_is_an_error(tmp_path: Path) -> None:
    path = write_instances(tmp_path / "set.json", annotate(segmentation=[[]]))
    with pytest.raises(DatasetError, match="no usable annotation: 1 annotations without a mask or a box"):
        read(path)


IMAGE = {"id": 5, "file_name": "5.png", "height": 4, "width": 6}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": [IMAGE, {**IMAGE, "file_name": "6.png"}]}, r"5\.png and 6\.png both have the id 5"),
        ({"images": [IMAGE, {**IMAGE, "id": 6}]}, "1 photos under several ids"),
        ({"images": [{**IMAGE, "id": "5"}]}, r"images\.0\.id Input should be a valid integer"),
        ({"images": [{**IMAGE, "height": 0}]}, r"images\.0\.height Input should be greater than 0"),
        ({"images": [{**IMAGE, "height": 6, "width": 4}]}, r"image 5 has 4x6 pixels in .*5\.png has 6x4"),
        ({"images": [{**IMAGE, "file_name": "6.png"}]}, r"6\.png is in none of .*/images"),
        ({"images": None}, "not a COCO file: images Input should be a valid"),
        ({"categories": [{"id": 2}]}, r"categories\.0\.name Field required"),
        ({"categories": [{"id": 2, "name": "cat"}, {"id": 2, "name": "dog"}]}, "the category id 2 is listed twice"),
    ],
)
def test_an_invalid_image_or_category_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write_instances(tmp_path / "set.json", annotate(), **changed)
    with pytest.raises(DatasetError, match=message):
        read(path)


def test_an_image_listed_twice_is_read_once(tmp_path: Path) -> None:
    dataset = read(write_instances(tmp_path / "set.json", annotate(), images=[IMAGE, IMAGE]))
    assert (len(dataset.images), dataset.skipped) == (1, ("1 images listed twice; the first: image 5",))


def test_content_that_is_not_coco_is_an_error_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    with pytest.raises(DatasetError, match=r"set\.json does not exist: expected a JSON file"):
        read(path)
    for content in ("[", "[]", '{"images": [1], "annotations": [], "categories": []}'):
        path.write_text(content)
        with pytest.raises(DatasetError, match=r"set\.json: not a COCO file: "):
            read(path)
    with pytest.raises(DatasetError, match=r"contains none of panoptic\.json.*annotations/instances_SPLIT\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("index", "photos", "options"),
    [
        ("annotations/instances_default.json", "images", {}),  # CVAT
        ("annotations/instances_train.json", "images/train", {"split": "train"}),  # CVAT with subsets
        ("valid/_annotations.coco.json", "valid", {}),  # Roboflow
        ("test/_annotations.coco.json", "test", {"split": "test"}),
        ("_annotations.coco.json", ".", {}),
        ("result.json", "images", {}),  # Label Studio
        ("labels.json", "data", {}),  # FiftyOne
        ("annotations/instances_val2017.json", "val2017", {}),
        ("instances.json", "images", {}),
    ],
)
@pytest.mark.parametrize("is_path", [False, True])
def test_exports_are_found_by_their_folder_or_by_the_file(
    tmp_path: Path, index: str, photos: str, options: dict[str, str], is_path: bool
) -> None:
    path = write_instances(tmp_path / index, annotate(), photos=tmp_path / photos)
    dataset = read(path) if is_path else read(tmp_path, **options)
    assert (dataset.kind, read_areas(dataset)) == ("masks", [6.0])


@pytest.mark.parametrize("name", ["my photos\\5.png", "/data/local-files/?d=my%20photos/5.png"])
def test_names_by_windows_and_by_label_studio_and_missing_sizes_are_read(tmp_path: Path, name: str) -> None:
    images = [{"id": 5, "file_name": name}]
    path = write_instances(tmp_path / "result.json", annotate(), photos=tmp_path / "my photos", images=images)
    assert read_areas(read(path)) == [6.0]


def write_panoptic(folder: Path, *, isthing: Any = 1, **changed: Any) -> Path:
    """Write a photo of 4 x 6 pixels with one segment."""
    drawn.write_photo(folder / "images" / "5.png")
    drawn.write_panoptic_png(folder / "panoptic" / "5.png", drawn.three_regions())
    annotation = {"image_id": 5, "file_name": "5.png", "segments_info": [{"id": 1, "category_id": 2}], **changed}
    category = {"id": 2, "name": "cat", "isthing": isthing}
    annotations, categories = (
        [{name: value for name, value in entry.items() if value != "absent"}] for entry in (annotation, category)
    )
    drawn.write_json(
        folder / "panoptic.json", {"images": [IMAGE], "annotations": annotations, "categories": categories}
    )
    return folder


def test_the_format_is_recognized_by_the_content(tmp_path: Path) -> None:
    folder = write_panoptic(tmp_path)
    assert read(folder).kind == read(folder / "panoptic.json").kind == "panoptic"
    (folder / "panoptic.json").rename(folder / "own.json")
    assert read(folder / "own.json").kind == "panoptic"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"isthing": "absent"}, "'cat' needs isthing, 0 or 1"),
        ({"segments_info": "absent"}, r"annotations: 0\.segments_info Field required"),
        ({"segments_info": [{"id": 1, "category_id": 3}]}, "image 5: category 3 of segment 1 is not listed"),
        ({"segments_info": [{"id": 1, "category_id": 2}] * 2}, "segments need different ids"),
        ({"file_name": "6.png"}, r"6\.png is in none of .*panoptic"),
    ],
)
def test_an_invalid_panoptic_file_is_an_error(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(write_panoptic(tmp_path, **changed), format="panoptic")


def test_a_label_of_another_size_than_its_photo_is_found_at_the_start(tmp_path: Path) -> None:
    folder = write_panoptic(tmp_path)
    drawn.write_panoptic_png(folder / "panoptic" / "5.png", np.ones((6, 4), int))
    with pytest.raises(DatasetError, match=r"panoptic/5\.png has 4x6 pixels, .*images/5\.png 6x4"):
        read(folder)


@pytest.mark.parametrize("seed", range(8))
def test_the_runs_of_a_compressed_rle_are_those_of_the_mask(seed: int) -> None:
    mask = np.random.default_rng(seed).random((37, 300)) < 0.02 * 2**seed
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel().astype(int)])))
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert parse_counts(counts).tolist() == runs.tolist()


def test_coco_panoptic_has_supercategories_or_every_thing_by_itself(tmp_path: Path) -> None:
    annotations = tmp_path / "annotations"
    drawn.write_photo(tmp_path / "val2017" / "9.jpg")
    drawn.write_panoptic_png(annotations / "panoptic_val2017" / "9.png", drawn.three_regions(70, 800, bottom=9000))
    segments = [
        {"id": 70, "category_id": 18, "iscrowd": 0},
        {"id": 800, "category_id": 17, "iscrowd": 1},
        {"id": 9000, "category_id": 177},
    ]
    content = {
        "images": [{"id": 9, "file_name": "9.jpg"}],
        "annotations": [{"image_id": 9, "file_name": "9.png", "segments_info": segments}],
        "categories": [
            {"id": number, "name": name, "supercategory": group, "isthing": int(number < 100)}
            for number, name, group in (
                (1, "person", "person"), (17, "cat", "animal"), (18, "dog", "animal"),
                (171, "wall-brick", "wall"), (177, "wall-wood", "wall"),
            )
        ],
    }  # fmt: skip
    drawn.write_json(annotations / "panoptic_val2017.json", content)
    dataset = read(tmp_path, format="coco")
    assert (dataset.kind, dataset.taxonomy.num_things) == ("panoptic", 2)
    assert dataset.taxonomy.names == ("animal", "person", "wall")
    labels = dataset.images[0].annotation.read(4, 6)
    assert (labels.segments, labels.crowds) == ({70: 0, 800: 0, 9000: 2}, {800})
    assert [(each.category, each.area, each.is_crowd, each.bbox) for each in labels.objects] == [
        (0, 6.0, False, (0.0, 0.0, 3.0, 2.0)),
        (0, 6.0, True, (3.0, 0.0, 3.0, 2.0)),
    ]
    fine = read(tmp_path, format="coco", classes="things-and-supercategories")
    assert (fine.taxonomy.names, fine.taxonomy.num_things) == (("person", "cat", "dog", "wall"), 3)
    assert fine.images[0].annotation.read(4, 6).segments == {70: 2, 800: 1, 9000: 3}


def test_coco_instances_are_read_from_polygons_and_rle_and_an_image_may_have_none(tmp_path: Path) -> None:
    photos = tmp_path / "val2017"
    drawn.write_photo(photos / "3.png", seed=3)
    write_instances(
        tmp_path / "annotations" / "instances_val2017.json",
        annotate(area=5.5, bbox=[0, 0, 3, 2]),
        annotate(id=2, category_id=1, iscrowd=1, segmentation=LAST_COLUMN),
        photos=photos,
        images=[IMAGE, {"id": 3, "file_name": "3.png"}],
        categories=[{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}],
    )
    dataset = read(tmp_path, format="coco-instances")
    assert (dataset.kind, dataset.taxonomy.names) == ("masks", ("person", "cat"))
    assert [each.image_id for each in dataset.images] == [3, 5]
    assert dataset.images[0].annotation.read(4, 6).objects == ()
    first, second = dataset.images[1].annotation.read(4, 6).objects
    assert (first.category, first.area, first.bbox, coco.area(first.rle)) == (1, 5.5, (0, 0, 3, 2), 6)
    # 20 pixels down the first five columns of four are empty: the last column remains.
    assert (second.category, second.area, second.bbox, second.is_crowd) == (0, 4.0, (5.0, 0.0, 1.0, 4.0), True)


def test_coco_stuff_is_mapped_to_27_classes_and_cropped(tmp_path: Path) -> None:
    drawn.write_photo(tmp_path / "images" / "val2017" / "1.jpg")
    drawn.write_label_png(tmp_path / "annotations" / "val2017" / "1.png", drawn.three_regions(0, 181, bottom=255))
    dataset = read(tmp_path, format="coco-stuff")
    assert (dataset.kind, dataset.crop_px) == ("semantic", 320)
    assert (len(dataset.taxonomy.names), dataset.taxonomy.num_things) == (27, 12)
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
    dataset = read(tmp_path, format="cityscapes")
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
    dataset = read(tmp_path, format="voc-masks")
    found = dataset.images[0].annotation.read(4, 6).objects
    assert [(dataset.taxonomy.names[each.category], each.area) for each in found] == [("cat", 5.0), ("person", 6.0)]


VOC_XML = """<annotation><object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>3</xmax><ymax>4</ymax></bndbox></object><object><name>person</name><difficult>1</difficult><bndbox><xmin>4</xmin>
<ymin>1</ymin><xmax>4</xmax><ymax>1</ymax></bndbox></object></annotation>"""


def test_voc_boxes_include_both_corners_and_difficult_objects_are_crowds(tmp_path: Path) -> None:
    drawn.write_photo(tmp_path / "JPEGImages" / "000005.jpg")
    for name, content in (("Annotations/000005.xml", VOC_XML), ("ImageSets/Main/trainval.txt", "000005\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    dataset = read(tmp_path, format="voc-boxes", split="trainval")
    assert dataset.kind == "boxes"
    dog, person = dataset.images[0].annotation.read(4, 6).objects
    assert (dog.bbox, dog.area, dog.is_crowd, dog.rle) == ((0.0, 1.0, 3.0, 3.0), 9.0, False, None)
    assert (person.bbox, person.is_crowd) == ((3.0, 0.0, 1.0, 1.0), True)


@pytest.mark.parametrize("format", ["coco", "coco-instances", "coco-stuff", "cityscapes", "voc-masks"])
def test_a_folder_in_another_format_is_rejected_with_its_name(tmp_path: Path, format: str) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        read(tmp_path, format=format)


def test_options_that_do_not_apply_to_a_format_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no splits, got 'val'"):
        DatasetSpec(folder=tmp_path, format="panoptic", split="val")
    with pytest.raises(ConfigError, match="has fixed classes"):
        DatasetSpec(folder=tmp_path, format="cityscapes", classes="things-and-supercategories")
