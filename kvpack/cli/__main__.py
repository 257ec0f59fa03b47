"""Run the command as `python -m kvpack.cli`."""

from kvpack.cli.main import main

main()
