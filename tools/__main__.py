"""``python -m weightcache.tools``: the command line."""

from weightcache.tools.cli import main

main()
