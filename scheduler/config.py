"""How a scheduler is set up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes and policies.

    Attributes:
        num_pages: Pages of KV in the pool.
        vocab_size: Token ids are below this.
        max_context: Most tokens of a call, prompt and generation together; a small pool allows fewer.
        page_size: Tokens in a page.
        num_slots: Most calls that run at once.
        max_step_tokens: Most tokens computed in one step; longer prompts are computed in chunks.
        order, retention: Names of policies.
        prefix_cache: Whether calls share pages with what other calls computed.
        max_calls, max_programs: Live ones; more are refused.
        max_nodes: Nodes of one program's graph; more are refused.
        max_decisions: How many lines the decision log keeps.
    """

    num_pages: int
    vocab_size: int
    max_context: int
    page_size: int = 16
    num_slots: int = 64
    max_step_tokens: int = 512
    order: str = "program-fcfs"
    retention: str = "lru"
    prefix_cache: bool = True
    max_calls: int = 8192
    max_programs: int = 8192
    max_nodes: int = 65536
    max_decisions: int = 4096

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "num_slots", "max_step_tokens", "max_calls", "max_programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
