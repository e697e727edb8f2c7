"""An agent with tools: the model looks facts up in a SQLite database and calculates, before it answers.

Try `treadle run examples/tool_agent.py`, or `treadle run examples/tool_agent.py "How many people live in Rome?"`.

The model may write calls of these tools, with arguments that fit, or an `Answer`; which of the two is its own choice. A
model of 135M parameters finds the right tool and city for a plain question, but does not notice that it has what it
needs, and calls again. So its turns are limited; at the limit a call without tools answers from what the tools said,
errors included, and the result says so. When to calculate it does not know: it answers itself, right or wrong.
"""

import operator
import sqlite3
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, Field

from treadle.dsl import Chat, Tool, llm, program, prompt, tool
from treadle.dsl.errors import StepLimitError

POPULATIONS = [("Paris", 2_100_000), ("Berlin", 3_700_000), ("Madrid", 3_300_000), ("Rome", 2_800_000)]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Answer(BaseModel):
    """What the model writes in the end."""

    answer: Annotated[str, Field(min_length=1, max_length=60)]


class Result(TypedDict):
    """What `main` returns; `answered_by` says whether the agent came to an end by itself."""

    answer: str
    answered_by: Literal["agent", "step limit"]
    facts: list[str]


@tool(effects="read")
def calculate(left: float, operation: Literal["+", "-", "*", "/"], right: float) -> str:
    """Calculate with two numbers."""
    return f"{left:g} {operation} {right:g} = {OPERATIONS[operation](left, right):g}"


def lookup(database: sqlite3.Connection) -> Tool[..., Any]:
    """A tool that reads this database."""

    @tool(effects="read")
    async def population(city: Annotated[str, Field(max_length=20)]) -> str:
        """Look up how many people live in a city."""
        row = database.execute("SELECT people FROM cities WHERE name = ?", (city,)).fetchone()
        if row is None:
            raise LookupError(f"there is no city {city!r} in the database")
        return f"{city} has {row[0]:,} people."

    return population


@llm(max_tokens=40, temperature=0, stop="\n")
async def conclude(question: str, facts: list[str]) -> str:
    return prompt(f"{' '.join(facts)}\n\n{question} Answer in one short sentence.")


async def tool_results(chat: Chat[Any]) -> list[str]:
    """What the tools have told the model, without repetitions; a call of the last turn may not have run."""
    calls = [call for message in chat.messages for call in message.tool_calls if call.result.is_done]
    return list(dict.fromkeys([str(await call.result) for call in calls]))


@program
async def main(question: str = "How many people live in Berlin?", max_steps: int = 3) -> Result:
    """An answer to the question, and what the tools said."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE cities (name TEXT COLLATE NOCASE, people INTEGER)")
    database.executemany("INSERT INTO cities VALUES (?, ?)", POPULATIONS)
    chat = Chat(tools=[lookup(database), calculate], returns=Answer, max_tokens=120, temperature=0)
    answered_by: Literal["agent", "step limit"] = "agent"
    try:
        answer = (await chat.ask(question, max_steps=max_steps)).answer
        facts = await tool_results(chat)
    except StepLimitError:
        answered_by = "step limit"
        facts = await tool_results(chat)
        answer = await conclude(question, facts)
    return {"answer": answer, "answered_by": answered_by, "facts": facts}
