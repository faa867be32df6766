"""MobileNetV2: torchvision's layers behind this package's interface.

Paper: Sandler et al. 2018, arXiv:1801.04381.
Shapes: B pictures, h x w cells (7 x 7 at 224 pixels), 1280 channels.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.layers import Classifier


@dataclass(frozen=True)
class MobileNetConfig:
    """width multiplies the channels of all layers but the last one; num_classes 0 means no head."""

    name: str = "mobilenet-v2"
    image_size: int = 224
    width: float = 1.0
    num_classes: int = 1000
    family: str = "mobilenet"


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics move only while its weights are trained: frozen, it evaluates."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.num_batches_tracked = None  # only a momentum of None would read it; many files lack it

    def forward(self, x: Tensor) -> Tensor:
        moving = self.training and self.weight.requires_grad
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, moving, self.momentum, self.eps)

    def _load_from_state_dict(self, *args):
        # BatchNorm's own would ask for num_batches_tracked
        nn.Module._load_from_state_dict(self, *args)


class MobileNet(Classifier):
    """Pictures (B, 3, H, W) -> logits (B, num_classes); H and W are multiples of 32."""

    def __init__(self, config: MobileNetConfig):
        from torchvision.models import MobileNetV2  # here: it takes a second

        super().__init__()
        self.config = config
        body = MobileNetV2(num_classes=1, width_mult=config.width, norm_layer=BatchNorm)
        self.features, self.num_features = body.features, body.last_channel
        self.num_flat_features = self.num_features * (-(-config.image_size // 32)) ** 2
        self.head = nn.Identity()
        self.reset_classifier(config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the cells of the last feature map, row by row, (B, h w, 1280)."""
        return self.features(x).flatten(2).transpose(1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all cells, (B, 1280)."""
        return self.features(x).mean((2, 3))

    def pool(self, tokens: Tensor) -> Tensor:
        """The same of all cells (B, h w, 1280)."""
        return tokens.mean(1)

    def flat(self, x: Tensor) -> Tensor:
        """All cells in one row, (B, h w 1280): 62,720 numbers at 224 pixels."""
        return self.forward_features(x).flatten(1)
