"""The kinds of checkpoints, one module each."""
