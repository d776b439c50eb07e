"""A work directory, which keeps what later runs can use, and the command `qsim cache`, which shows and removes it."""
