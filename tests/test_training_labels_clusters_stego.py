import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training.labels.clusters.stego import (
    ClusterProbe,
    CodeHead,
    Correlations,
    Pictures,
    Points,
    compare,
    correlate,
    draw_points,
    draw_shuffle,
    sample,
)
from training.labels.clusters.stego_recipe import STEGO_PRESETS, StegoConfig, Term

TOLERANCE = 1e-6  # the golden's own: a recomputation in float64 differs by 2e-8
SMALL, SHIPPED = STEGO_PRESETS["small"], STEGO_PRESETS["shipped"]
REFERENCE = {
    "cocostuff27_vit_base": STEGO_PRESETS["base"],
    "cocostuff27_vit_small_1_31_22": SMALL,
    "cocostuff27_vit_small_10_3": STEGO_PRESETS["small-10-3"],
    "cityscapes_10_3": STEGO_PRESETS["cityscapes"],
    "iaroa_default": SHIPPED,
    "variant_no_pointwise": replace(SHIPPED, is_centred=False),
    "variant_no_zero_clamp": replace(SHIPPED, is_clamped=False),
    "variant_stabalize": replace(SHIPPED, is_capped=True),
}


def load(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "stego" / "stego.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def correlate_stored(stored: dict[str, Tensor], config: StegoConfig) -> tuple[Correlations, Tensor, Tensor]:
    codes, near_codes = (stored[name].clone().requires_grad_() for name in ("code", "code_pos"))
    losses = correlate(
        Pictures(features=stored["feats"], codes=codes),
        Pictures(features=stored["feats_pos"], codes=near_codes),
        Points(first=stored["coords1"], second=stored["coords2"]),
        stored["neg_perms"],
        config,
    )
    return losses, codes, near_codes


@pytest.mark.golden
@pytest.mark.parametrize("name", REFERENCE)
def test_losses_and_gradients_are_the_reference_s(golden: Path, name: str) -> None:
    expected = json.loads((golden / "stego" / "expected.json").read_text())[name]
    losses, codes, near_codes = correlate_stored(load(golden), REFERENCE[name])
    total = losses.weigh(REFERENCE[name])
    assert losses.itself.item() == pytest.approx(expected["pos_intra_loss"], abs=TOLERANCE)
    assert losses.neighbour.item() == pytest.approx(expected["pos_inter_loss"], abs=TOLERANCE)
    assert losses.stranger.item() == pytest.approx(expected["neg_inter_loss"], abs=TOLERANCE)
    assert total.item() == pytest.approx(expected["total"], abs=TOLERANCE)
    gradient, near_gradient = torch.autograd.grad(total, [codes, near_codes])
    assert gradient.norm().item() == pytest.approx(expected["grad_code_norm"], abs=TOLERANCE)
    assert near_gradient.norm().item() == pytest.approx(expected["grad_code_pos_norm"], abs=TOLERANCE)


@pytest.mark.golden
def test_the_gradient_is_the_reference_s_in_every_code(golden: Path) -> None:
    stored = load(golden)
    losses, codes, near_codes = correlate_stored(stored, SMALL)
    gradient, near_gradient = torch.autograd.grad(losses.weigh(SMALL), [codes, near_codes])
    assert (gradient - stored["grad_code"]).abs().max() < TOLERANCE
    assert (near_gradient - stored["grad_code_pos"]).abs().max() < TOLERANCE


@pytest.mark.golden
def test_the_probe_is_the_reference_s(golden: Path) -> None:
    stored = load(golden)
    expected = json.loads((golden / "stego" / "expected.json").read_text())["cluster_probe"]
    probe = ClusterProbe(27, 10)
    probe.centroids.data.copy_(stored["probe_clusters"])
    loss = probe(stored["probe_codes"])
    assert loss.item() == pytest.approx(expected["loss_hard"], abs=TOLERANCE)
    (gradient,) = torch.autograd.grad(loss, [probe.centroids])
    assert (gradient - stored["probe_grad_clusters"]).abs().max() < TOLERANCE
    cosines = probe.compare(stored["probe_codes"])
    assert torch.equal(cosines.argmax(1), stored["probe_assign"].long())
    assert torch.allclose((2 * cosines).log_softmax(1), stored["probe_logprob_alpha2"], atol=TOLERANCE)


def test_like_features_pull_codes_together_and_unlike_ones_push_them_apart() -> None:
    # Two points whose features are orthogonal, seen at the corners: cosines are 1 and 0, the shift lies between.
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    corners = torch.tensor([[[[-1.0, 0.0]], [[1.0, 0.0]]]])
    config = replace(SMALL, is_centred=False)

    def loss(codes: list[list[float]]) -> float:
        pictures = Pictures(features=features, codes=torch.tensor(codes)[None, :, None]).look(corners)
        return compare(pictures, pictures, Term(weight=1.0, shift=0.25), config).item()

    assert loss([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(-(0.75 + 0.75) / 4)
    assert loss([[1.0, 1.0], [0.0, 0.0]]) == pytest.approx(-(0.75 + 0.75 - 0.25 - 0.25) / 4)


def test_corners_are_the_centres_of_the_outermost_cells_and_x_comes_first() -> None:
    maps = torch.arange(6.0).reshape(1, 1, 2, 3)
    points = torch.tensor([[[[-1.0, -1.0], [1.0, -1.0]], [[-1.0, 1.0], [0.0, 0.0]]]])
    assert sample(maps, points)[0, 0].T.tolist() == [[0.0, 2.0], [3.0, 2.5]]


def test_nobody_is_a_stranger_to_himself() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        order = draw_shuffle(5)
        assert (order != torch.arange(5)).all()
        assert set(order.tolist()) <= set(range(5))


def test_points_lie_inside_the_picture() -> None:
    points = draw_points(3, 11)
    for each in (points.first, points.second):
        assert each.shape == (3, 11, 11, 2)
        assert -1.0 <= each.min() < -0.9 < 0.9 < each.max() <= 1.0


def test_the_probe_does_not_move_the_codes_and_the_head_drops_nothing_when_it_is_used() -> None:
    torch.manual_seed(0)
    head, probe = CodeHead(6, 4, dropout=0.5), ClusterProbe(3, 4)
    features = torch.randn(2, 6, 5, 5)
    probe(head(features)).backward()
    assert all(parameter.grad is None for parameter in head.parameters())
    assert probe.centroids.grad is not None
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))
