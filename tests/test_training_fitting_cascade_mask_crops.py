from pathlib import Path

import numpy as np
import pytest
import torch

from training.fitting.cascade.mask_crops import crop_maps, crop_masks


def test_a_crop_holds_the_cells_that_are_half_covered() -> None:
    masks = torch.zeros(2, 12, 12, dtype=torch.bool)
    masks[0, 2:6, 2:4] = True  # the left half of the box below
    masks[1, 2:3, :] = True  # a quarter of the upper cells
    boxes = torch.tensor([[2.0, 2.0, 6.0, 6.0], [2.0, 2.0, 6.0, 10.0]])
    crops = crop_masks(masks, boxes, torch.tensor([0, 1]), 2)
    assert crops[0].tolist() == [[True, False], [True, False]]
    assert not crops[1].any()


def test_the_mean_of_a_ramp_is_the_place_of_the_middle() -> None:
    ramp = torch.arange(20.0).expand(1, 10, 20)
    crop = crop_maps(ramp, torch.tensor([[2.0, 1.0, 12.0, 9.0]]), 2)
    torch.testing.assert_close(crop, torch.tensor([[[4.0, 9.0], [4.0, 9.0]]]))  # pixel i's centre lies at i + 0.5


def test_crops_are_the_same_where_the_network_computes_in_half() -> None:
    torch.manual_seed(0)
    maps, boxes = torch.rand(3, 20, 20), torch.tensor([[1.0, 2.0, 15.5, 17.0]] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = crop_maps(maps, boxes, 7)
    assert torch.equal(half, crop_maps(maps, boxes, 7))


@pytest.mark.golden
@pytest.mark.parametrize("side", [7, 14])
def test_crops_are_the_references_roialign(golden: Path, side: int) -> None:
    with np.load(golden / "detectron2" / "units.npz") as stored:
        units = {key: torch.from_numpy(stored[key]) for key in stored.files if key.startswith("roialign_")}
    features, rois = units["roialign_features"], units["roialign_rois"]
    maps, boxes = features[rois[:, 0].long()], rois[:, 1:] / 4.0  # N C H W
    found = torch.stack([crop_maps(maps[:, channel], boxes, side) for channel in range(maps.shape[1])], dim=1)
    # float32 rounds places of up to 76 pixels by 4e-6, and the features rise by up to 6 from one to the next.
    torch.testing.assert_close(found, units[f"roialign_out{side}"], rtol=0.0, atol=3e-5)
