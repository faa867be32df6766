"""Picture classification: task (training), run (a finished run), prompts (CLIP's zero-shot score)."""
