"""BAGEL: two experts in one transformer, SigLIP and the FLUX autoencoder (Deng et al., arXiv 2505.14683)."""

from reca.models.bagel.config import BagelConfig as Config
from reca.models.bagel.model import Bagel as Adapter

__all__ = ["Adapter", "Config"]
