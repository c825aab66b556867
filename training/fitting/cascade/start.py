"""The weights that a cascade's fit begins with."""

from torch import nn

from model.network.cascade import BoxHead, BoxPredictor, MaskHead
from model.network.panoptic_cascade import PanopticCascade
from model.network.proposals import ProposalHead
from model.network.pyramid import Pyramid
from model.network.resnet import NormedConv

_CLASS_DEVIATION, _BOX_DEVIATION, _MASK_DEVIATION, _PROPOSAL_DEVIATION = 0.01, 0.001, 0.001, 0.01


def initialise(network: PanopticCascade) -> None:
    """Draw the weights as detectron2 does; a ViT and the pyramid over it stay as torch drew them, as in ViTDet.

    "MSRA" is He's initialisation by fan-out; Caffe's "Xavier" is uniform by fan-in.
    """
    for module in network.modules():
        match module:
            case ProposalHead():
                for convolution in (module.conv, module.objectness_logits, module.anchor_deltas):
                    _draw_normal(convolution, _PROPOSAL_DEVIATION)
            case BoxHead():
                for linear in (module.fc1, module.fc2):
                    _draw_xavier(linear)
            case BoxPredictor():
                _draw_normal(module.cls_score, _CLASS_DEVIATION)
                _draw_normal(module.bbox_pred, _BOX_DEVIATION)
            case MaskHead():
                for child in module.children():
                    _draw_msra(child)
                _draw_normal(module.predictor, _MASK_DEVIATION)
    if isinstance(network.backbone, Pyramid):
        for layer in network.backbone.bottom_up.modules():
            if isinstance(layer, nn.Conv2d):
                _draw_msra(layer)
        for layer in network.backbone.children():
            if isinstance(layer, NormedConv):
                _draw_xavier(layer)
    if network.shape.stuff_clusters:
        for layer in network.sem_seg_head.modules():
            if isinstance(layer, nn.Conv2d):
                _draw_msra(layer)


def _draw_normal(layer: nn.Module, deviation: float) -> None:
    nn.init.normal_(layer.get_parameter("weight"), std=deviation)
    _clear_bias(layer)


def _draw_msra(layer: nn.Module) -> None:
    nn.init.kaiming_normal_(layer.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
    _clear_bias(layer)


def _draw_xavier(layer: nn.Module) -> None:
    nn.init.kaiming_uniform_(layer.get_parameter("weight"), a=1)
    _clear_bias(layer)


def _clear_bias(layer: nn.Module) -> None:
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.get_parameter("bias"))
