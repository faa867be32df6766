"""Open-ended questions: task (training), run (a finished run), features (kept)."""
