"""BAGEL: two experts in one transformer, SigLIP and the FLUX autoencoder (Deng et al., arXiv 2505.14683)."""

from reca.models.bagel.adapter import Bagel as Adapter
from reca.models.bagel.config import BagelConfig as Config

__all__ = ["Adapter", "Config"]
