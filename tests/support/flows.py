"""Functions and tools that the tests of the DSL share."""

from pydantic import BaseModel

from treadle.dsl import In, VarList, llm, prompt, tool


class Plan(BaseModel):
    questions: list[str]


class Review(BaseModel):
    score: float
    fix: str = ""


@llm
async def plan(topic: str) -> Plan:
    return prompt(f"plan {topic}")


@llm
async def write(topic: In[str], style: str = "plain") -> str:
    return prompt(f"write {topic} {style}")


@llm
async def review(draft: In[str]) -> Review:
    return prompt(f"review [{draft}]")


@llm
async def merge(notes: VarList[str]) -> str:
    return prompt(f"merge:\n{notes}")


@tool(effects="read")
async def double(number: int) -> int:
    """Doubles."""
    return 2 * number


@tool(effects="read")
def fail(text: str) -> str:
    """Fails."""
    raise RuntimeError(f"no luck with {text}")
