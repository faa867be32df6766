"""Picture classification: task (training), run (a finished run), prompts (zero-shot with CLIP)."""
