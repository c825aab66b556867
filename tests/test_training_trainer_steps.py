import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.panoptic_cascade.config import CASCADE_PRESETS
from training.trainer.trainer import changed_fields, clip_gradients, to_device

TINY = MASK_TRANSFORMER_PRESETS["tiny"]


@dataclass(frozen=True, kw_only=True)
class Item:
    tensor: Tensor
    photo: Path


@dataclass(frozen=True, kw_only=True)
class Items:
    items: tuple[Item, ...]
    count: int


def make_parameters(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(each))) for each in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return parameters


def test_gradients_are_shortened_together_or_each_by_itself() -> None:
    parameters = make_parameters([3.0, 0.0], [0.0, 4.0])
    assert clip_gradients(parameters, 1.0, is_each=False) == pytest.approx(5.0)
    assert parameters[0].grad == pytest.approx(torch.tensor([0.6, 0.0]), abs=1e-5)
    parameters = make_parameters([3.0, 0.0], [0.0, 0.5])
    assert clip_gradients(parameters, 1.0, is_each=True) == pytest.approx(3.0)
    assert parameters[0].grad == pytest.approx(torch.tensor([1.0, 0.0]), abs=1e-5)
    assert parameters[1].grad == pytest.approx(torch.tensor([0.0, 0.5]))


def test_a_parameter_that_no_loss_reached_is_left_out() -> None:
    parameters = [*make_parameters([0.5]), nn.Parameter(torch.zeros(2))]
    assert clip_gradients(parameters, 1.0, is_each=True) == pytest.approx(0.5)
    assert parameters[1].grad is None


def test_a_run_begun_before_a_field_existed_goes_on_with_its_default_alone() -> None:
    stored = {name: value for name, value in asdict(TINY).items() if name != "precision"}
    assert changed_fields(stored, TINY) == []
    assert changed_fields(stored, replace(TINY, precision="bf16")) == ["precision"]


def test_lists_of_a_recipe_are_known_again_after_json() -> None:
    recipe = CASCADE_PRESETS["paper-cutler"]
    stored = json.loads(json.dumps(asdict(recipe)))
    assert changed_fields(stored, recipe) == []
    assert changed_fields(stored, replace(recipe, milestones=(70_000,))) == ["milestones"]


def test_every_tensor_of_a_batch_goes_to_the_device() -> None:
    items = Items(items=(Item(tensor=torch.ones(2), photo=Path("a.png")),), count=1)
    moved = to_device(items, torch.device("meta"))
    assert moved.items[0].tensor.device.type == "meta"
    assert (moved.items[0].photo, moved.count) == (Path("a.png"), 1)
