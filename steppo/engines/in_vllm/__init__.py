"""Goes onto the path of a vLLM server. It is its own folder so that nothing else does."""
