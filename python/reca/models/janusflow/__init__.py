"""JanusFlow: one causal Llama with SigLIP for understanding and rectified flow on SDXL's latents for generation (Ma et
al., arXiv 2411.07975).
"""

from reca.models.janusflow.config import JanusFlowConfig as Config
from reca.models.janusflow.model import JanusFlow as Adapter

__all__ = ["Adapter", "Config"]
