"""Ten mistakes that people really made in LoRA code, each as one edit of this code:
guess what breaks.

    python -m minilora.lessons.mistakes        one at a time on a terminal, all of them elsewhere

`MISTAKES` holds the edit (file, old text, new text), where it was seen, and the test that turns
red. tests/lessons/test_mistakes.py makes each edit in a copy and demands that the named test fails.
"""

import sys
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One edit and what comes of it. `test` is a pytest address; `seen` says where it was made."""

    name: str
    file: str
    old: str
    new: str
    test: str
    seen: str
    why: str


MISTAKES = (
    Mistake(
        "alpha // r",
        "minilora/lora.py",
        "if use_rslora else lora_alpha / r\n",
        "if use_rslora else lora_alpha // r\n",
        "tests/test_lora.py::test_s_is_alpha_over_r_and_alpha_over_root_r_for_rslora",
        "JamesQFreeman/LoRA-ViT, lora.py",
        "With alpha 4 and r 8 the scale is 0 and LoRA does nothing, without a word; with 6 and 4 it is 1, not 1.5.",
    ),
    Mistake(
        "A and B both zero",
        "minilora/lora.py",
        "            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))\n        nn.init.zeros_",
        "            nn.init.zeros_(self.lora_A.weight)\n        nn.init.zeros_",
        "tests/test_lora.py::test_at_init_dL_dB_is_not_zero_and_dL_dA_is",
        "asked again and again in microsoft/LoRA's issues, whose comment and code disagreed",
        "dL/dB holds a factor A and dL/dA a factor B: with both zero both gradients are, for ever.",
    ),
    Mistake(
        "A initialised as its transpose",
        "minilora/lora.py",
        "            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))\n        nn.init.zeros_",
        "            nn.init.kaiming_uniform_(self.lora_A.weight.T, a=math.sqrt(5))\n        nn.init.zeros_",
        "tests/test_lora.py::test_at_init_A_is_uniform_between_minus_and_plus_1_over_root_in",
        "projects that store A as (in, r), mlx-lm among them, when they convert",
        "The fan is then r, not in: A starts larger by sqrt(in / r), ten times for ViT-base, and B's steps too.",
    ),
    Mistake(
        "dropout after B A",
        "minilora/lora.py",
        "        d = self.lora_dropout(x, self) if d is None else d\n        if fused.applies(x, W):",
        "        d = x\n        if self.training and self.lora_dropout.p:\n"
        "            return self.base_layer(x) + self.lora_dropout(self.scaling * F.linear(F.linear(x, A), B), self)\n"
        "        if fused.applies(x, W):",
        "tests/test_lora.py::test_with_mask_d_y_is_W_x_plus_s_B_A_d_x_and_the_gradient_has_the_same_d",
        "home-made layers that write dropout(lora_B(lora_A(x)))",
        "It trains, but it is another regulariser: whole outputs of the update vanish instead of inputs of A.",
    ),
    Mistake(
        "scale forgotten in one gradient",
        "minilora/fused.py",
        "few(g, B.T).mul_(ctx.s)",
        "few(g, B.T)",
        "tests/test_fused.py::test_gradcheck_agrees_with_finite_differences",
        "every hand-written backward at one time or another",
        "dA and the low-rank part of dx are too small by s. Loss still falls, only slower: no curve shows it.",
    ),
    Mistake(
        "merging in place, twice",
        "minilora/lora.py",
        "(W.to(delta.dtype) + delta).to(W.dtype)",
        "W.add_(delta.to(W.dtype))",
        "tests/test_lora.py::test_merged_is_a_plain_linear_of_weight_W_plus_s_B_A_with_the_same_y_and_leaves_W_alone",
        "microsoft/LoRA merges inside train(mode); cloneofsimo/lora and others merged twice",
        "W is changed behind its owner's back: a second merge adds s B A again; in half precision W - d + d is not W.",
    ),
    Mistake(
        "a target is matched without its dot",
        "minilora/targets.py",
        'name == suffix or name.endswith("." + suffix)',
        "name.endswith(suffix)",
        "tests/test_inject.py::test_a_target_is_a_full_name_or_its_end_after_a_dot_never_a_part_of_a_word",
        "scripts that write `if 'q_proj' in name`",
        "q_proj also takes xq_proj and cross_q_proj: layers are adapted that nobody asked for.",
    ),
    Mistake(
        "the head is not saved",
        "minilora/inject.py",
        "for name, parameter in model.named_parameters() if parameter.requires_grad}",
        'for name, parameter in model.named_parameters() if ".lora_" in name}',
        "tests/test_adapter.py::test_the_names_in_the_file_are_exactly_these",
        "JamesQFreeman/LoRA-ViT saves fc.weight without fc.bias; many save the lora_ keys alone",
        "Loaded again, the model has its adapters and a new random classifier: accuracy at chance, and no error.",
    ),
    Mistake(
        "adapters in half precision",
        "minilora/lora.py",
        "dtype = torch.float32 if W.dtype in (torch.float16, torch.bfloat16) else W.dtype",
        "dtype = W.dtype",
        "tests/test_lora.py::test_trainable_tensors_are_float32_whatever_the_base_and_the_output_keeps_its_dtype",
        'the crash "Attempting to unscale FP16 gradients", reported to PEFT and others dozens of times',
        "Small steps round to nothing (python -m minilora.lessons.merge), and GradScaler refuses float16 gradients.",
    ),
    Mistake(
        "a .weight to read",
        "minilora/lora.py",
        '        if name in ("weight", "bias"):\n            raise AttributeError(',
        '        if name in ("weight", "bias"):\n            return getattr(self.base_layer, name)\n'
        "            raise AttributeError(",
        "tests/test_lora.py::test_there_is_no_weight_to_read_behind_the_back_of_LoRA",
        "PEFT's wrapper has one: with timm's BEiT, 0 of 2 adapters got a gradient",
        "Code that multiplies by layer.weight instead of calling the layer runs on, and LoRA has no effect in it.",
    ),
)


def set_in(text: str, first: str, then: str = "    ") -> str:
    """`text` within 100 columns, after `first`."""
    return textwrap.fill(text, 98, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)


def described(mistake: Mistake, number: int) -> str:
    """The edit, as a person sees it in a diff."""
    lines = [set_in(line.strip(), "  - ", "      ") for line in mistake.old.strip().splitlines()]
    lines += [set_in(line.strip(), "  + ", "      ") for line in mistake.new.strip().splitlines()]
    return "\n".join([f"{number}. {mistake.name} ({mistake.file})", *lines])


def answer(mistake: Mistake) -> str:
    where = f"Seen: {mistake.seen}."
    return "\n".join([set_in(mistake.why, "  ", "  "), set_in(where, "  "), set_in(f"Red: {mistake.test}", "  "), ""])


def main() -> None:
    print("Ten edits of this code. What goes wrong with each, and would you have noticed?\n")
    for number, mistake in enumerate(MISTAKES, 1):
        print(described(mistake, number))
        if sys.stdin.isatty() and sys.stdout.isatty():
            try:
                input("  your guess, then Enter: ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
        print(answer(mistake))


if __name__ == "__main__":
    main()
