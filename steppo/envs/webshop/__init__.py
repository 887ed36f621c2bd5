"""WebShop's text environment (Yao et al., 2022) over the publishers' files, without Java and without a server."""

from steppo.envs.webshop.env import WebshopEnv

__all__ = ["WebshopEnv"]
