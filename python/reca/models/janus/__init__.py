"""Janus-Pro: one Llama with SigLIP for understanding and VQ codes for generation (Chen et al., arXiv 2501.17811)."""

from reca.models.janus.config import JanusConfig as Config
from reca.models.janus.model import Janus as Adapter

__all__ = ["Adapter", "Config"]
