"""A chain: the output of one call is the input of the next, without waiting in between.

Try `treadle run examples/chain.py`, or `treadle run examples/chain.py "an old clock"`.

`story` and `title` are variables: calling an `@llm` function adds a call to the program and returns at once. The story
is passed on un-awaited, so the runtime knows the whole chain from the start, and the prompt of `title` is computed
while the story is still being written. A model of 135M parameters writes a simple story of a few sentences; its titles
are plausible, if plain.
"""

from typing import TypedDict

from treadle.dsl import In, llm, program, prompt


class Story(TypedDict):
    """What `main` returns."""

    title: str
    story: str


@llm(max_tokens=90, temperature=0)
async def write(subject: str) -> str:
    return prompt(f"Write a very short story about {subject}, in three sentences.")


@llm(max_tokens=24, temperature=0, stop="\n")
async def name(story: In[str]) -> str:
    return prompt(f"{story}\n\nGive this story a title of a few words. Write the title only.")


@program
async def main(subject: str = "a fox who learns to swim") -> Story:
    """A story and its title."""
    story = write(subject)
    title = name(story)
    return {"title": await title, "story": await story}
