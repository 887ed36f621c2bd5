"""ALFWorld's text games (Shridhar et al., 2021), in a simulator of their own."""

from steppo.envs.alfworld.env import AlfworldEnv

__all__ = ["AlfworldEnv"]
