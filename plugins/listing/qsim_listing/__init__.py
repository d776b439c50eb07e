"""The commands `qsim components` and `qsim plugins`: what is installed, and a check of it."""
