"""A chain: the output of one call is the input of the next, without waiting in between.

Try `treadle run examples/chain.py`, or `treadle run examples/chain.py "an old clock"`.

`story` and `short` are variables: calling an `@llm` function adds a call to the program and returns at once. The story
is passed on un-awaited, so the runtime knows the whole chain from the start, and the prompt of `shorten` is computed
while the story is still being written. A model of 135M parameters writes a simple story with odd turns, and shortens it
to a sentence that keeps some of it.
"""

from typing import TypedDict

from treadle.dsl import In, llm, program, prompt


class Story(TypedDict):
    """What `main` returns."""

    story: str
    in_short: str


@llm(max_tokens=80, temperature=0, stop="\n")
async def write(subject: str) -> str:
    return prompt(f"Tell me a two-sentence story about {subject}.")


@llm(max_tokens=50, temperature=0, stop="\n")
async def shorten(story: In[str]) -> str:
    return prompt(f"{story}\n\nRewrite this in one short sentence.")


@program
async def main(subject: str = "a fox who learns to swim") -> Story:
    """A story, and the same in one sentence."""
    story = write(subject)
    short = shorten(story)
    return {"story": await story, "in_short": await short}
