"""Open-ended questions: task (training), run (a finished run), features (kept), targets (soft),
shards (what they are made of); the two towers are in tasks/towers.py.
"""
