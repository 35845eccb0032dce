"""``python -m invflow`` is the command ``invflow``."""

from invflow.cli import main

main()
