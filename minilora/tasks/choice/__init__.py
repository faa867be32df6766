"""Multiple choice: task (training), run (a finished run)."""
