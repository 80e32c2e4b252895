"""One training loop: recipe, schedules, checkpoints."""
