"""The training loop, its recipe, and its set-up on Ray Train."""
