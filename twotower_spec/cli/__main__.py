"""`python -m twotower_spec.cli`."""

from twotower_spec.cli.app import main

main()
