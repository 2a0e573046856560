"""JanusFlow: SigLIP for what it sees, rectified flow in SDXL's latents for what it draws, one causal Llama (Ma et al.,
arXiv 2411.07975).
"""

from reca.models.janusflow.config import JanusFlowConfig as Config
from reca.models.janusflow.model import JanusFlow as Adapter

__all__ = ["Adapter", "Config"]
