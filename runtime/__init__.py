"""Runs models and programs. Importing this loads no tensor library; making an engine does."""

from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.local import Chunk, Completion, LocalRuntime, Prompt, local
from treadle.scheduler import SamplingParams

__all__ = ["Chunk", "Completion", "EngineConfig", "LocalRuntime", "Prompt", "SamplingParams", "local"]
