"""Packers: steps -> batches of tokens."""

from steppo.packing.base import Packer
from steppo.packing.cost import PackingCost
from steppo.packing.padded import PaddedPacker
from steppo.packing.prefix_tree import PrefixTreePacker

__all__ = ["Packer", "PackingCost", "PaddedPacker", "PrefixTreePacker"]
