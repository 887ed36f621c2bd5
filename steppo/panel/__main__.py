"""``python -m steppo.panel``. Worker processes do not import a ``__main__`` of this name, so they stay free of torch."""

from steppo.panel.command import main

main()
