"""Published encoders come under our names and compute what they computed under theirs."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from model.checkpoints.dino import convert_resnet, import_encoder, load_encoder, read_encoder_state_dict
from model.errors import CheckpointError, ConfigError
from model.files import hash_file
from model.networks.backbones import ResNet
from model.networks.vit import EncoderConfig, VisionTransformer

STEM, INNER, OUTER = 4, 2, 8
BLOCKS = (3, 4, 6, 3)
VITS = {
    "dino B/8": EncoderConfig(embed_dim=128, depth=4, patch_px=8, grid_size=3, num_registers=0, has_layer_scale=False),
    "dinov2 with registers": EncoderConfig(
        embed_dim=64, depth=4, patch_px=14, grid_size=4, num_registers=4, has_layer_scale=True
    ),
}


def draw_resnet() -> dict[str, Tensor]:
    """Random weights under torchvision's names."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(convolution: str, norm: str, outer: int, inner: int, kernel: int) -> None:
        state[f"{convolution}.weight"] = torch.randn(outer, inner, kernel, kernel) * (inner * kernel * kernel) ** -0.5
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 0.5 + torch.rand(outer), torch.randn(outer)
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = torch.randn(outer), 0.5 + torch.rand(outer)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("conv1", "bn1", STEM, 3, 7)
    inner = STEM
    for stage, count in enumerate(BLOCKS):
        narrow, wide = INNER << stage, OUTER << stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            add(f"{name}.conv1", f"{name}.bn1", narrow, inner, 1)
            add(f"{name}.conv2", f"{name}.bn2", narrow, narrow, 3)
            add(f"{name}.conv3", f"{name}.bn3", wide, narrow, 1)
            if block == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", wide, inner, 1)
            inner = wide
    return state


def run_torchvision(state: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """The four stages of torchvision's ResNet, written from its definition."""

    def convolve(maps: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{convolution}.weight"]
        maps = functional.conv2d(maps, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, variance, scale, shift = (
            state[f"{norm}.{part}"].reshape(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (maps - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    maps = functional.max_pool2d(convolve(pixels, "conv1", "bn1", 2).relu(), 3, 2, 1)
    stages = []
    for stage, count in enumerate(BLOCKS, start=1):
        for block in range(count):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 and stage > 1 else 1
            inner = convolve(maps, f"{name}.conv1", f"{name}.bn1").relu()
            inner = convolve(inner, f"{name}.conv2", f"{name}.bn2", stride).relu()
            inner = convolve(inner, f"{name}.conv3", f"{name}.bn3")
            shortcut = convolve(maps, f"{name}.downsample.0", f"{name}.downsample.1", stride) if block == 0 else maps
            maps = (inner + shortcut).relu()
        stages.append(maps)
    return stages


def test_a_resnet_of_dino_computes_as_torchvision_does(tmp_path: Path) -> None:
    state = draw_resnet()
    torch.save(state, tmp_path / "dino_resnet50_pretrain.pth")
    network = ResNet(STEM, INNER, OUTER, "batch").eval()
    network.load_state_dict(convert_resnet(read_encoder_state_dict(tmp_path / "dino_resnet50_pretrain.pth")))
    pixels = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        outputs = network(pixels)
    for output, expected in zip(outputs, run_torchvision(state, pixels), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)  # the norms' order of operations differs


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up.", "module."])
@pytest.mark.parametrize("has_counters", [True, False])
def test_a_resnet_with_detectron2s_names_is_read(tmp_path: Path, prefix: str, has_counters: bool) -> None:
    expected = convert_resnet(draw_resnet())
    assert {"stem.conv1.weight", "res2.0.shortcut.norm.running_mean", "res5.2.conv3.norm.bias"} <= expected.keys()
    kept = {name: tensor for name, tensor in expected.items() if has_counters or "num_batches" not in name}
    arrays = {f"{prefix}{name}": tensor.numpy() for name, tensor in kept.items()}
    content = {"model": arrays, "__author__": "CutLER", "matching_heuristics": True}
    (tmp_path / "dino_RN50_pretrain_d2_format.pkl").write_bytes(pickle.dumps(content))
    found = convert_resnet(read_encoder_state_dict(tmp_path / "dino_RN50_pretrain_d2_format.pkl"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_an_imported_resnet_loads_without_its_classifier_and_misfits_are_named(tmp_path: Path) -> None:
    state = draw_resnet()
    torch.save({**state, "fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, tmp_path / "supervised.pth")
    report = import_encoder(str(tmp_path / "supervised.pth"), tmp_path / "resnet.safetensors")
    assert (report["kind"], report["tensors"]) == ("ResNet-50", 53 * 6)
    assert report["sha256"] == hash_file(tmp_path / "supervised.pth")
    written, expected = load_file(tmp_path / "resnet.safetensors"), convert_resnet(state)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    del state["layer3.5.bn2.bias"]
    with pytest.raises(CheckpointError, match=r'Missing.* "res4\.5\.conv2\.norm\.bias"\. Unexpected.* "x"\.'):
        convert_resnet({**state, "x": torch.ones(1)})


@pytest.mark.parametrize("name", VITS)
def test_an_imported_vit_loads(tmp_path: Path, name: str) -> None:
    shape = VITS[name]
    torch.manual_seed(0)
    state = {key: torch.randn(tensor.shape) for key, tensor in VisionTransformer(shape).state_dict().items()}
    training = {f"module.backbone.{key}": tensor for key, tensor in state.items()}
    heads = {"module.head.last_layer.weight_v": torch.ones(1), "module.backbone.mask_token": torch.ones(1)}
    torch.save({"teacher": {**training, **heads}, "epoch": 3}, tmp_path / "training.pth")
    report = import_encoder((tmp_path / "training.pth").as_uri(), tmp_path / "vit.safetensors")
    assert report["kind"] == "vision transformer"
    assert set(load_file(tmp_path / "vit.safetensors")) == set(state)
    encoder = load_encoder(str(tmp_path / "vit.safetensors"), shape.grid_size * shape.patch_px)
    assert encoder.config == shape
    assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a": torch.ones(1)},
            r"odd\.pth: not a known encoder: neither a ViT nor a ResNet-50 \('stem\.conv1",
        ),
        ({"conv1.weight": torch.tensor(1.0)}, "not a known encoder"),
        ({"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)}, "not a DINO or DINOv2 encoder"),
        ({"patch_embed.proj.weight": torch.tensor(1.0)}, "not a DINO or DINOv2 encoder"),
    ],
)
def test_another_network_is_refused_and_no_file_written(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=message):
        import_encoder(str(tmp_path / "odd.pth"), tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth"]


@pytest.mark.parametrize("name", ["encoder.pth", "encoder"])
def test_an_encoder_is_only_written_to_a_safetensors_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"written to a \.safetensors file"):
        import_encoder(str(tmp_path / "any.pth"), tmp_path / name)
