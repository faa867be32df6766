"""Lessons: small programs that show one thing each, with numbers to follow.

python -m minilora.lessons.equation      one step of LoRA, worked by hand and by the code
"""
