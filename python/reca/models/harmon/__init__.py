"""Harmon: Qwen2.5 around a MAR encoder that understanding and generation share (Wu et al., arXiv 2503.21979)."""

from reca.models.harmon.config import HarmonConfig as Config
from reca.models.harmon.model import Harmon as Adapter

__all__ = ["Adapter", "Config"]
