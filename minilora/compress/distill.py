"""Distillation: a small model learns from the labels and from a large model's answers.

    loss = alpha CE(labels, student) + (1 - alpha) KL(softmax(teacher / T) || softmax(student / T))

The temperature T softens both distributions. With respect to the student's logits z the second
term's gradient is (softmax(z / T) - softmax(t / T)) / T, for large T about (z - t) / (K T^2) once
both are centred: at alpha = .9 and T = 15 below a thousandth of the cross entropy's. The factor T^2
(`t2`) takes that back.

Paper: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
Shapes: B examples, K classes or answers.
"""

import torch
from torch import Tensor


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float, t2: bool = False) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of each row, times T^2 with `t2`: (B, K),
    (B, K) -> (B,). In float32 at least, also in autocast: the differences are small."""
    wide = torch.promote_types(student.dtype, torch.float32)
    p, q = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (teacher, student))
    # (B,); 0 log 0 = 0 for a choice that is not there
    rows = (p.exp() * (p - q).where(p > -torch.inf, 0.0)).sum(-1)
    return rows * temperature**2 if t2 else rows


def distillation_loss(
    hard: Tensor, student: Tensor, teacher: Tensor, counted: Tensor, alpha: float, temperature: float, t2: bool = False
) -> Tensor:
    """alpha * hard + (1 - alpha) * mean over the counted rows of `soft_divergence`.

    hard () is the task's own loss, student and teacher (B, K) are logits; counted (B,) bool leaves
    out the rows that the task's loss leaves out too, such as broken pictures.
    """
    rows = soft_divergence(student, teacher, temperature, t2).where(counted, 0.0)  # (B,)
    return alpha * hard + (1 - alpha) * rows.sum() / counted.sum().clamp(min=1)


def certain(teacher: Tensor) -> Tensor:
    """Logits (B, K) that are sure of the teacher's best answer: 0 there, -inf elsewhere. At T = 1
    the divergence from them is -log softmax(student)_best."""
    best = torch.arange(teacher.shape[-1], device=teacher.device) == teacher.argmax(-1, keepdim=True)
    return torch.zeros_like(teacher).masked_fill(~best, -torch.inf)
