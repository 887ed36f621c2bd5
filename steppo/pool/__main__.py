"""``python -m steppo.pool``."""

from steppo.pool.command import main

main()
