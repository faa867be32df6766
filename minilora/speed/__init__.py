"""Speed: read this last. Faster forms of what the layers do anyway.

gemm      float32 matrix products by oneDNN, where it is the faster library
dropout   one mask for all layers that read the same x, drawn four numbers at a time
threads   how many there are, and how they wait

`minilora.speed.enabled = False` switches all of it off, and with it the fused form of LoRA in
fused.py. Values and gradients stay the same up to rounding; dropout keeps its distribution and
draws other masks.
"""

enabled = True
