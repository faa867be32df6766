"""Multiple choice: task (training), run (a finished run), text (a question and its
choices as token ids).
"""
