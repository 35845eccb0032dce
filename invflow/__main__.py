"""``python -m invflow`` is the command ``invflow``."""

from invflow.cli.entry import main

main()
