"""``python -m steppo.data``. Worker processes do not import a ``__main__`` of this name, so they stay free of torch."""

from steppo.data.command import main

main()
