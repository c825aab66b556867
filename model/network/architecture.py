"""The networks there are."""

from model.network.mask_transformer import MaskTransformer
from model.network.panoptic_cascade import PanopticCascade

Network = MaskTransformer | PanopticCascade


def list_idle(network: Network) -> tuple[str, ...]:
    """Beginnings of the names of weights that no answer depends on: training uses them, or the encoder has them."""
    match network:
        case MaskTransformer():
            return ("encoder.norm.", "decoder.patch_mask.", "decoder.embedding_head.")
        case PanopticCascade():
            return ()
