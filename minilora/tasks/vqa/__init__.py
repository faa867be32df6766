"""Open-ended questions: task (training), run (a finished run), model (two towers), features,
targets, shards.
"""
