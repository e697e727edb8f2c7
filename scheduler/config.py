"""How a scheduler is set up."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NODES = 65536


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of engine time that computing and loading KV take.

    Attributes:
        per_token: For each new token.
        per_pair: For each new token times the tokens before it.
        load: For each token loaded from host memory.
    """

    per_token: float
    per_pair: float
    load: float

    def compute(self, start: int, end: int) -> float:
        """To prefill the tokens `start .. end` of a context."""
        return (end - start) * (self.per_token + self.per_pair * (start + end) / 2)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes and policies.

    Attributes:
        num_pages: Pages of KV in the pool.
        vocab_size: Token ids are below this; None takes any.
        max_context: Most tokens of a call, prompt and generation together; a small pool allows fewer.
        page_size: Tokens in a page.
        num_slots: Most calls that run at once.
        max_step_tokens: Most tokens computed in one step; longer prompts are computed in chunks.
        order, retention, admission: Names of policies.
        num_host_pages: Pages of KV that host memory holds beside them; 0 for none.
        max_step_moves: Most pages saved, and most loaded, in one step.
        patience: How much longer than break-even Treadle's policies wait for a program that is away.
        tenant_share: Share of all pages that the leases of one tenant may keep; more of them goes first when memory is
            short.
        costs: What computing and loading cost, for policies that weigh one against the other; None learns it.
        prefix_cache: Whether calls share pages with what other calls computed.
        max_calls, max_programs: Live ones; more are refused.
        max_nodes: Nodes of one program's graph; more are refused.
        max_decisions: How many lines the decision log keeps.
    """

    num_pages: int
    vocab_size: int | None
    max_context: int
    page_size: int = 16
    num_slots: int = 64
    max_step_tokens: int = 512
    order: str = "treadle"
    retention: str = "treadle"
    admission: str = "treadle"
    num_host_pages: int = 0
    max_step_moves: int = 256
    costs: Costs | None = None
    patience: float = 1.0
    tenant_share: float = 1.0
    prefix_cache: bool = True
    max_calls: int = 8192
    max_programs: int = 8192
    max_nodes: int = MAX_NODES
    max_decisions: int = 4096

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "num_slots", "max_step_tokens", "max_calls", "max_programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
