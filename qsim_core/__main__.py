"""`python -m qsim_core` is `qsim`."""

from qsim_core.cli.main import main

main(prog_name="qsim")
