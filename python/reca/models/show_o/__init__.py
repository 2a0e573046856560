"""Show-o: one transformer for text tokens and masked image tokens (Xie et al., arXiv 2408.12528)."""

from reca.models.show_o.config import ShowOConfig as Config
from reca.models.show_o.model import ShowO as Adapter

__all__ = ["Adapter", "Config"]
