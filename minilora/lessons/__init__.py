"""Lessons: programs of one screen that show one thing each, with numbers to follow.

python -m minilora.lessons.equation      one step of LoRA, worked by hand and by the code
python -m minilora.lessons.layer         one layer: six facts, from B = 0 to the dense equivalent
python -m minilora.lessons.loop          load, inject, train, save, load again, merge
python -m minilora.lessons.rank          why low rank suffices, and a task for which it does not
python -m minilora.lessons.cost          bytes and arithmetic of full, LoRA and linear
python -m minilora.lessons.merge         merging, two adapters, rounding in float16
python -m minilora.lessons.mistakes      ten edits that turn a test red: guess why
"""
