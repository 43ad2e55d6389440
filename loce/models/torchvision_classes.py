"""What the outputs of torchvision's own Mask R-CNN checkpoints stand for."""

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights


def coco_rows() -> list[str | None]:
    """Names of the 91 outputs (row = COCO category id); None for the background, row 0, and ids COCO left out."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [None if name in ("__background__", "N/A") else name for name in names]
