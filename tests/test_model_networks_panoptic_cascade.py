"""The panoptic cascade has static shapes, ignores batch and padding, and equals detectron2."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
from torch import Tensor

from model.contract import Contract, InputSize, RawOutputs, Thresholds
from model.errors import ConfigError
from model.images import Letterbox, resize_map
from model.networks.backbones import Norm
from model.networks.interface import NetworkOutput
from model.networks.panoptic_cascade import (
    CascadeConfig,
    CascadeInferenceConfig,
    PanopticCascade,
    fold_batch_norms,
)
from model.networks.roi_align import RoiAlignConfig
from model.networks.roi_heads import DetectionConfig
from model.networks.rpn import ProposalConfig
from model.networks.vit import EncoderConfig
from model.postprocessing.panoptic import Segmentation, postprocess

CONFIG = replace(tiny.CASCADE, backbone_norm="frozen", fpn_norm="none")
ENCODER = EncoderConfig(embed_dim=64, depth=2, patch_px=14, grid_size=4, num_registers=1, has_layer_scale=True)
WITH_VIT = replace(CONFIG, backbone="vit", encoder=ENCODER)
INFERENCE = CascadeInferenceConfig(
    proposals=ProposalConfig(pre_nms_topk=40, post_nms_topk=30, nms_iterations=4),
    detections=DetectionConfig(max_candidates=60, max_detections=12, nms_iterations=4),
    pooling=RoiAlignConfig(max_box_side=14),
)
POST_100 = CascadeInferenceConfig(proposals=ProposalConfig(post_nms_topk=100))
HEIGHT, WIDTH = 64, 96


def draw_network(config: CascadeConfig, inference: CascadeInferenceConfig = INFERENCE) -> PanopticCascade:
    torch.manual_seed(1)
    return PanopticCascade(config, inference).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[CONFIG, WITH_VIT], ids=["resnet50", "vit"])
def network(request: pytest.FixtureRequest) -> PanopticCascade:
    return draw_network(request.param)


def draw_pixels(batch: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)


def draw_sizes(batch: int) -> Tensor:
    return torch.tensor([[HEIGHT, WIDTH], [40, 90], [64, 50]])[:batch]


def test_outputs_are_in_range_and_boxes_inside_their_images(network: PanopticCascade) -> None:
    sizes = draw_sizes(3)
    raw = network(draw_pixels(3), sizes)
    assert (raw.scores > 0.05).any(1).all()  # or the test would prove nothing
    assert raw.scores.diff(dim=1).max() <= 0.0
    assert 0 <= raw.clusters.min() <= raw.clusters.max() < 3
    for probabilities in (raw.scores, raw.masks):
        assert 0.0 <= probabilities.min() <= probabilities.max() <= 1.0
    limits = torch.stack([sizes[:, 1], sizes[:, 0]], dim=1)[:, None]
    assert raw.boxes.min() >= 0.0
    assert (raw.boxes[..., 2:] <= limits).all()


def check_same(first: NetworkOutput, second: NetworkOutput, noise: float) -> None:
    for name, part in first.parts.items():
        torch.testing.assert_close(part, second.parts[name], rtol=noise, atol=noise)


def test_outputs_do_not_depend_on_the_batch(network: PanopticCascade) -> None:
    pixels, sizes = draw_pixels(3), draw_sizes(3)
    together = network(pixels, sizes)
    assert (together.semantic[0] - together.semantic[1]).abs().max() > 0.01  # or the test would prove nothing
    for index in range(3):
        alone = network(pixels[index : index + 1], sizes[index : index + 1])
        # float32; kernels may sum in another order for another batch.
        check_same(alone, together.map(lambda part, index=index: part[index : index + 1]), 1e-4)


def test_outputs_do_not_depend_on_the_values_of_the_padding(network: PanopticCascade) -> None:
    pixels, sizes = draw_pixels(1), torch.tensor([[40, 70]])
    other = pixels.clone()
    other[:, :, 40:], other[:, :, :, 70:] = 255, 3
    check_same(network(pixels, sizes), network(other, sizes), 0.0)


@pytest.mark.parametrize("shape", [CONFIG, WITH_VIT], ids=["resnet50", "vit"])
def test_all_tensors_are_on_the_device_of_the_pixels(shape: CascadeConfig) -> None:
    """The device "meta" computes nothing and refuses to mix with another device."""
    network = PanopticCascade(shape, INFERENCE).eval().to("meta")
    raw = network(draw_pixels(2).to("meta"), draw_sizes(2).to("meta"))
    assert {each.device.type for each in raw.parts.values()} == {"meta"}


def test_a_network_without_a_semantic_head_predicts_things_everywhere() -> None:
    network = draw_network(replace(CONFIG, stuff_clusters=0))
    semantic = network(draw_pixels(2), draw_sizes(2)).semantic
    assert semantic.shape == (2, 1, HEIGHT // 4, WIDTH // 4)
    assert not [name for name in network.state_dict() if name.startswith("sem_seg_head")]


def test_class_agnostic_masks_equal_identical_masks_per_cluster() -> None:
    every_pair = replace(INFERENCE, detections=DetectionConfig(max_candidates=90, max_detections=60, nms_iterations=4))
    agnostic = draw_network(replace(CONFIG, cls_agnostic_mask=True), every_pair)
    specific = draw_network(CONFIG, every_pair)
    state = agnostic.state_dict()
    for name in ("roi_heads.mask_head.predictor.weight", "roi_heads.mask_head.predictor.bias"):
        assert len(state[name]) == 1
        state[name] = state[name].repeat_interleave(3, dim=0)
    specific.load_state_dict(state)
    pixels, sizes = draw_pixels(3), draw_sizes(3)
    raw = agnostic(pixels, sizes)
    assert raw.clusters[raw.scores > 0.0].unique().tolist() == [0, 1, 2]  # or the test would prove nothing
    check_same(raw, specific(pixels, sizes), 1e-5)  # the last sum has another size


def draw_large(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return pixels, torch.tensor([[height, width], [40, 50], [height, 33]])[:batch]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [CONFIG, WITH_VIT], ids=["resnet50", "vit"])
def test_the_exported_graph_takes_any_batch_and_input_size(shape: CascadeConfig) -> None:
    """From 96 px per side: below, the last level has a single row, which export takes for a constant."""
    network = draw_network(shape)
    batch = torch.export.Dim("batch", min=1, max=64)
    rows, columns = torch.export.Dim("rows", min=3, max=64), torch.export.Dim("columns", min=3, max=64)
    shapes = {"pixels": {0: batch, 2: 32 * rows, 3: 32 * columns}, "sizes": {0: batch}}
    graph = torch.export.export(network, draw_large(2, 160, 224), dynamic_shapes=shapes).module()
    for height, width in ((96, 96), (256, 128)):
        pixels, sizes = draw_large(3, height, width)
        check_same(NetworkOutput(*graph(pixels, sizes)), network(pixels, sizes), 0)


def test_inputs_that_are_not_multiples_of_32_are_refused(network: PanopticCascade) -> None:
    with pytest.raises(ConfigError, match="60x96"):
        network(torch.zeros(1, 3, 60, WIDTH, dtype=torch.uint8), draw_sizes(1))


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
def test_outputs_equal_detectron2s(golden: Path, name: str) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name)
    raw = network(case.pixels, case.sizes)
    count = len(case.arrays["det_scores"])
    assert int((raw.scores > 0.0).sum()) == count
    assert raw.clusters[:, :count].equal(case.tensor("det_classes"))
    reference.check_near(raw.scores[:, :count], case.tensor("det_scores"), reference.SCORE_NOISE)
    reference.check_near(raw.boxes[:, :count], case.tensor("det_boxes"), reference.BOX_NOISE_PX)
    reference.check_near(raw.masks[:, :count], case.tensor("det_masks28"), reference.MASK_NOISE)
    reference.check_near(raw.semantic, case.tensor("sem_logits_s4"), reference.SEMANTIC_NOISE)


def finish(raw: NetworkOutput, case: reference.Case, clusters: int) -> Segmentation:
    """Compute the panoptic map at the requested size.

    detectron2 upsamples semantic logits by four before it crops and resizes them. The first step is done here, so
    `postprocess` gets them at stride 1.
    """
    height, width = (int(length) for length in case.arrays["out_hw"])
    in_height, in_width = case.sizes[0].tolist()
    logits = raw.semantic[0].numpy()
    upsampled = [resize_map(each, 4 * each.shape[0], 4 * each.shape[1]) for each in logits]
    outputs = RawOutputs(
        scores=raw.scores[0].numpy(),
        clusters=raw.clusters[0].numpy(),
        boxes=raw.boxes[0].numpy(),
        masks=raw.masks[0].numpy(),
        semantic=np.stack(upsampled),
    )
    combine = case.card["combine"]
    thresholds = Thresholds(
        score_threshold=combine["instances_confidence"],
        overlap_threshold=combine["overlap_threshold"],
        min_stuff_area_fraction=combine["stuff_area_limit"] / (height * width),
    )
    input_size = InputSize(height_px=in_height, width_px=in_width)
    contract = Contract(
        name="a", version="1", network="panoptic_cascade", input_sizes=(input_size,), stride_px=1, box_mask_size=28,
        max_detections=len(outputs.scores), thing_clusters=clusters, stuff_clusters=len(logits) - 1,
    )  # fmt: skip
    letterbox = Letterbox(
        height=height, width=width, resized_height=in_height, resized_width=in_width, input_size=input_size, stride_px=1
    )
    return postprocess(outputs, letterbox, contract, "panoptic", thresholds)


def check_segments(segmentation: Segmentation, expected: list[dict[str, Any]], clusters: int) -> None:
    """Compare segments in order; detectron2 counts thing clusters from 0."""
    segments = [(each.id, each.cluster, each.is_thing) for each in segmentation.segments]
    assert segments == [
        (each["id"], each["category_id"] + (1 if each["isthing"] else clusters), each["isthing"]) for each in expected
    ]


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.CASES)
@pytest.mark.parametrize(
    ("inference", "map_key", "segments_key"),
    [
        (CascadeInferenceConfig(), "panoptic_seg", "segments_info"),
        (POST_100, "post100_panoptic_seg", "segments_info_post100"),
    ],
    ids=["1000 proposals", "100 proposals"],
)
def test_panoptic_maps_equal_detectron2s(
    golden: Path, name: str, inference: CascadeInferenceConfig, map_key: str, segments_key: str
) -> None:
    case, network = reference.read_case(golden, name), reference.read_network(golden, name, inference)
    clusters = network.config.thing_clusters
    segmentation = finish(network(case.pixels, case.sizes), case, clusters)
    check_segments(segmentation, case.card[segments_key], clusters)
    assert (segmentation.label_map == case.arrays[map_key]).mean() >= 0.999


FOLD_CONFIG = CascadeInferenceConfig(proposals=ProposalConfig(pre_nms_topk=40, post_nms_topk=30))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_folded_network_computes_the_same_without_batch_norms(norm: Norm) -> None:
    torch.manual_seed(3)
    shape = replace(tiny.CASCADE, backbone_norm=norm, fpn_norm=norm)
    network = PanopticCascade(shape, FOLD_CONFIG).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)  # in place: every scale, shift, mean and variance counts
    pixels = tiny.draw_noise(1, 64, 96)
    sizes = torch.tensor([[64, 90]])
    folded = fold_batch_norms(network)
    before = network.backbone(pixels.float() / 255.0)
    after = folded.backbone(pixels.float() / 255.0)
    for one, other in zip(before, after, strict=True):
        assert one.std() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))  # float32, 53 layers
    assert folded(pixels, sizes).scores.shape == (1, 100)
    assert [name for name in folded.state_dict() if "running_mean" in name] == []
    assert "sem_seg_head.p2.0.norm.weight" in folded.state_dict()  # group norms stay
