"""Run the command as `python -m kvpack`."""

from kvpack.cli.main import main

main()
