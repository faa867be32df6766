"""Two towers for questions about pictures: any picture encoder, any text encoder, a head on both.

    vision, text = load_pretrained("vit-base-patch16-224", a), load_pretrained("bert-base", b)
    model = TwoTower(vision, text, num_classes=1000)
    logits = model(images, input_ids, attention_mask)

fusion "concat": [image, text] -> Linear(128) -> Linear(classes).
fusion "product": (ReLU(Linear(image)) * Linear(text), 256 wide) -> Linear(32) -> Linear(classes).
fusion "concat-product": i, t = GELU(Linear(norm(.))), 512 wide; [i, t, i * t] -> Linear(classes).
Shapes: B questions, N <= B pictures, dv and dt the widths of the towers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.errors import ModelError

DEFAULTS = {
    "concat": {"hidden": 128, "inner": 0, "dropout": 0.0},
    "product": {"hidden": 32, "inner": 256, "dropout": 0.2},
    "concat-product": {"hidden": 0, "inner": 512, "dropout": 0.5},
}


@dataclass(frozen=True)
class FusionConfig:
    """The configurations of both towers and the sizes of what joins them, None for the fusion's own
    default: hidden is the width of the last hidden layer (0: none), inner that of the product;
    inner 0 multiplies the features as they are."""

    name: str = "vqa"
    vision: object = None
    text: object = None
    fusion: str = "concat"
    hidden: int | None = None
    inner: int | None = None
    dropout: float | None = None
    num_classes: int = 1000
    family: str = "fusion"

    def __post_init__(self):
        if self.fusion not in DEFAULTS:
            raise ModelError(f"fusion {self.fusion!r} is not known; the choices are {', '.join(DEFAULTS)}")
        for key, value in DEFAULTS[self.fusion].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    @property
    def image_size(self) -> int:
        return self.vision.image_size


class ConcatFusion(nn.Module):
    """fc([image, text]), (B, dv), (B, dt) -> (B, hidden)."""

    def __init__(self, vision: int, text: int, config: FusionConfig):
        super().__init__()
        self.num_features = config.hidden
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(vision + text, config.hidden)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.fc(self.dropout(torch.cat([image, text], dim=-1)))


class ProductFusion(nn.Module):
    """fc(ReLU(image_proj(image)) * text_proj(text)), (B, dv), (B, dt) -> (B, hidden)."""

    def __init__(self, vision: int, text: int, config: FusionConfig):
        super().__init__()
        if not config.inner and vision != text:
            raise ValueError(f"a product without projections needs equal widths, not {vision} and {text}")
        self.num_features = config.hidden
        self.dropout = nn.Dropout(config.dropout)
        self.image_proj = nn.Linear(vision, config.inner) if config.inner else None
        self.text_proj = nn.Linear(text, config.inner) if config.inner else None
        self.fc = nn.Linear(config.inner or text, config.hidden)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        if self.image_proj is not None:
            image = F.relu(self.image_proj(self.dropout(image)))  # (B, inner)
            text = self.text_proj(self.dropout(text))  # (B, inner)
        return self.fc(image * text)


class ConcatProductFusion(nn.Module):
    """[i, t, i * t] with i = GELU(image_proj(norm(image))), t = GELU(text_proj(norm(text))),
    (B, dv), (B, dt) -> (B, 3 inner).

    What the question alone says (t) need not pass through the product, and no layer is narrower
    than hundreds of answers need. Of the picture it takes the pooled vector and the largest value
    of each feature over all tokens, high where a thing stands anywhere: dv is twice the tower's.
    """

    def __init__(self, vision: int, text: int, config: FusionConfig):
        super().__init__()
        self.num_features = 3 * config.inner
        self.image_norm, self.text_norm = nn.LayerNorm(vision), nn.LayerNorm(text)
        self.image_proj, self.text_proj = nn.Linear(vision, config.inner), nn.Linear(text, config.inner)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image = F.gelu(self.image_proj(self.image_norm(image)))  # (B, inner)
        text = F.gelu(self.text_proj(self.text_norm(text)))  # (B, inner)
        return self.dropout(torch.cat([image, text, image * text], dim=-1))


FUSIONS = {"concat": ConcatFusion, "product": ProductFusion, "concat-product": ConcatProductFusion}


class TwoTower(nn.Module):
    """Pictures (N, 3, H, W) and questions (B, T) -> logits (B, num_classes).

    image_index (B,) says which picture each question is about, so that a picture with several
    questions is encoded once; None: question i is about picture i. text_index does the same for a
    text that comes again. Features of frozen towers may be given instead of their inputs:
    image_features (N, dv), text_features (B, dt), as `encode_image` and `encode_text` return them.
    """

    head_modules = ("fusion", "head")

    def __init__(
        self,
        vision: nn.Module,
        text: nn.Module,
        num_classes: int,
        fusion: str = "concat",
        hidden: int | None = None,
        inner: int | None = None,
        dropout: float | None = None,
        name: str = "vqa",
    ):
        super().__init__()
        if getattr(vision.config, "num_classes", 0) and hasattr(vision, "reset_classifier"):
            vision.reset_classifier(0)  # nothing trainable outside the loss
        self.config = FusionConfig(name, vision.config, text.config, fusion, hidden, inner, dropout, num_classes)
        self.preprocess, self.labels = getattr(vision, "preprocess", {}), None
        self.vision, self.text = vision, text
        # a convolutional tower gives the product all its cells, not their mean
        self.flatten = fusion == "product" and hasattr(vision, "flat")
        self.peaks = fusion == "concat-product"
        width = vision.num_flat_features if self.flatten else vision.num_features * (1 + self.peaks)
        self.fusion = FUSIONS[fusion](width, text.num_features, self.config)
        self.num_features = self.fusion.num_features
        self.head = nn.Linear(self.num_features, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new, randomly initialised last layer for `num_classes` answers."""
        self.config = replace(self.config, num_classes=num_classes)
        like = {"device": self.head.weight.device, "dtype": self.head.weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like)

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, dv): pooled; for a product the flattened cells of a convolutional
        tower, for a concat-product the largest values over the tokens beside it."""
        if self.peaks:
            tokens = self.vision.forward_features(images)  # (N, T, d)
            return torch.cat([self.vision.pool(tokens), tokens.amax(1)], dim=-1)
        return self.vision.flat(images) if self.flatten else self.vision.pooled(images)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> (B, dt)."""
        return self.text.pooled(input_ids, attention_mask, token_type_ids)

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_index: Tensor | None = None,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        text_index: Tensor | None = None,
    ) -> Tensor:
        if image_features is None:
            image_features = self.encode_image(images)  # (N, dv)
        if text_features is None:
            text_features = self.encode_text(input_ids, attention_mask, token_type_ids)  # (B, dt)
        if image_index is not None:
            image_features = image_features[image_index]  # (B, dv)
        if text_index is not None:
            text_features = text_features[text_index]  # (B, dt)
        return self.head(self.fusion(image_features, text_features))

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The maps of the picture tower."""
        return self.vision.attention_maps(images)
