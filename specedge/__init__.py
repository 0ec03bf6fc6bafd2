"""specedge: edge-assisted serving of large language models. The public names, loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specedge.config import DraftConfig, EngineConfig, SamplingParams, SpecedgeError
    from specedge.engine.aio import AsyncEngine
    from specedge.engine.drafter import Drafter
    from specedge.engine.engine import Engine
    from specedge.engine.request import Chunk, Completion, Logprobs
    from specedge.engine.speculative import SpeculativeEngine
    from specedge.net.edge import Edge
    from specedge.net.server import Server

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine", "Chunk", "Completion", "DraftConfig", "Drafter", "Edge", "Engine", "EngineConfig", "Logprobs", "SamplingParams", "Server",
    "SpecedgeError", "SpeculativeEngine",
]

_HOME = {
    "AsyncEngine": "engine.aio",
    "Chunk": "engine.request",
    "Completion": "engine.request",
    "DraftConfig": "config",
    "Drafter": "engine.drafter",
    "Edge": "net.edge",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "Logprobs": "engine.request",
    "SamplingParams": "config",
    "Server": "net.server",
    "SpecedgeError": "config",
    "SpeculativeEngine": "engine.speculative",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'specedge' has no attribute {name!r}")
    return getattr(import_module(f"specedge.{_HOME[name]}"), name)
