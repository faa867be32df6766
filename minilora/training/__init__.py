"""Training: one plain loop and what it stands on. Nothing here knows of images or text."""
