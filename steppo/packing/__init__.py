"""Packers: steps -> batches of tokens."""

from steppo.packing.base import Packer
from steppo.packing.padded import PaddedPacker

__all__ = ["Packer", "PaddedPacker"]
