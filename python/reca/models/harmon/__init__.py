"""Harmon: Qwen2.5 around a MAR encoder that understanding and generation share (Wu et al., arXiv 2503.21979)."""

from reca.models.harmon.adapter import Harmon as Adapter
from reca.models.harmon.config import HarmonConfig as Config

__all__ = ["Adapter", "Config"]
