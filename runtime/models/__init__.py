"""Models: finding, fetching and opening them, and the decoders that they are loaded into."""

from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import ModelConfig, RopeScaling
from treadle.runtime.models.load import open_checkpoint
from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint
from treadle.runtime.models.registry import MODELS, installed, pull, resolve

__all__ = [
    "MODELS",
    "SHAPES",
    "Checkpoint",
    "ModelConfig",
    "RandomCheckpoint",
    "RopeScaling",
    "installed",
    "open_checkpoint",
    "pull",
    "resolve",
]
