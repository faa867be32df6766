"""The whole of LoRA on one screen: load, inject, count, train, save, load again, merge.

    python -m minilora.lessons.loop

No trainer, no task, no flags. The model knows 48 kinds of coloured shapes; it learns 8 new shapes.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import LoRAConfig, count_parameters, inject_lora, load_adapter, merge_lora, save_adapter
from minilora.data.generated.shapes import classification_splits
from reference_models import load_pretrained


def tensors(split) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 48, 48) in [-1, 1], as the model was trained, and labels (N,)."""
    pixels = torch.stack([torch.from_numpy(split.pixels(i)) for i in range(len(split))])
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor([sample.label for sample in split])


def base_model() -> nn.Module:
    """The nano ViT with the weights that come with the project, and a new head of 8 classes."""
    torch.manual_seed(0)
    return load_pretrained("vit-nano-patch8-48", num_classes=8)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model.eval()(x).argmax(-1) == y).float().mean().item()


def main(pictures: int = 800, epochs: int = 5) -> float:
    splits = classification_splits(train=pictures)
    (x, y), (x_val, y_val) = tensors(splits.train), tensors(splits.val)

    model = base_model()
    # on q_proj and v_proj
    inject_lora(model, LoRAConfig(r=8, lora_alpha=16, modules_to_save=("head",)))
    print(count_parameters(model))
    print(f"before: accuracy {accuracy(model, x_val, y_val):.1f} %")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy(model, x_val, y_val):.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)  # A, B and the head: all that was trained
        again = load_adapter(base_model(), folder).eval()
    print("loaded into a fresh model: the same logits", torch.equal(again(x_val), model.eval()(x_val)))
    plain = merge_lora(again)  # nn.Linear again, W + s B A
    print(f"merged: logits differ by {(plain(x_val) - model(x_val)).abs().max():.0e} at most")
    return accuracy(plain, x_val, y_val)


if __name__ == "__main__":
    main()
