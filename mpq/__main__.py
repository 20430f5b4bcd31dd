"""`python -m mpq` is the `mpq` command."""

from mpq.cli import main

main()
