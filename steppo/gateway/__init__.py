"""Programs that ask for chat completions, as episodes: an OpenAI-compatible server and the source that runs agents.

The worker processes import this package, so it loads neither torch nor the server.
"""
