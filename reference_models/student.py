"""The small student that a two-tower teacher is distilled into: convolutions and an LSTM.

Convolutions 3 -> 16 (stride 2, LeakyReLU) and 16 -> 32 (stride 2), max-pooling, one linear layer;
an embedding and an LSTM (Hochreiter and Schmidhuber 1997); product of both -> Linear(32) ->
Linear(classes). Shapes: B questions and pictures, T tokens, d width of both encoders.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.fusion import TwoTower


@dataclass(frozen=True)
class StudentConfig:
    """single_bias: the LSTM has one bias vector, as Keras', not torch's two that are only added."""

    name: str = "student"
    image_size: int = 224
    vocab_size: int = 30523
    dim: int = 256
    hidden: int = 32
    num_classes: int = 10
    single_bias: bool = True
    family: str = "student"


class ConvEncoder(nn.Module):
    """(B, 3, S, S) -> (B, d)."""

    head_modules = ()

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config, self.num_features = config, config.dim
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32 * (config.image_size // 8) ** 2, config.dim)

    def pooled(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.3)  # (B, 16, S / 2, S / 2); the slope is Keras' default
        x = F.max_pool2d(self.conv2(x), 2)  # (B, 32, S / 8, S / 8)
        return self.fc(x.flatten(1))

    forward = pooled

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """None: a convolutional network has no attention."""
        return []


class LSTMEncoder(nn.Module):
    """Token ids (B, T) -> the LSTM's output at the last token (B, d); without a mask at the end."""

    head_modules = ()

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config, self.num_features = config, config.dim
        self.word = nn.Embedding(config.vocab_size, config.dim)
        self.lstm = nn.LSTM(config.dim, config.dim, batch_first=True)
        if config.single_bias:
            del self.lstm.bias_hh_l0
            self.lstm.register_buffer("bias_hh_l0", torch.zeros(4 * config.dim), persistent=False)
            self.lstm._init_flat_weights()

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        states, _ = self.lstm(self.word(input_ids))  # (B, T, d)
        if attention_mask is None:
            return states[:, -1]
        last = attention_mask.sum(1) - 1  # (B,)
        return states[torch.arange(len(last), device=last.device), last]

    forward = pooled


class Student(TwoTower):
    """Pictures (N, 3, S, S) and questions (B, T) -> logits (B, num_classes), as TwoTower."""

    def __init__(self, config: StudentConfig):
        sizes = {"fusion": "product", "hidden": config.hidden, "inner": 0, "dropout": 0.0}
        super().__init__(ConvEncoder(config), LSTMEncoder(config), config.num_classes, **sizes)
        self.config = config
