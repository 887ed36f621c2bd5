"""Packers: steps -> batches of tokens."""

from steppo.packing.base import Packer
from steppo.packing.padded import PaddedPacker
from steppo.packing.prefix_tree import PrefixTreePacker

__all__ = ["Packer", "PaddedPacker", "PrefixTreePacker"]
