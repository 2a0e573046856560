"""OpenUni: InternVL3, learnable queries, a connector and SANA (Wu et al., arXiv 2505.23661)."""

from reca.models.open_uni.config import OpenUniConfig as Config
from reca.models.open_uni.model import OpenUni as Adapter

__all__ = ["Adapter", "Config"]
