"""Open-ended questions: task (training), run (a finished run), model (two towers), features (kept),
targets (soft), shards (what they are made of).
"""
