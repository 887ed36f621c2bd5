"""``python -m steppo.play``. Worker processes do not import a ``__main__`` of this name, so they stay free of torch."""

from steppo.play.command import main

main()
