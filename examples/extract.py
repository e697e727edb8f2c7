"""Structured extraction: a paragraph of text becomes a pydantic model.

Try `treadle run examples/extract.py`, or give a text of your own:
`treadle run examples/extract.py "Ada Lovelace was born in London in 1815 and loved mathematics."`

The grammar of the model's output is made from `Person`, so that what comes back always has its shape: short strings, a
four-digit year, one of the listed fields. Whether it is true is up to the model. One of 135M parameters copies names
and years from a short text fairly well; where it must think, as for the field, it often just guesses.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from treadle.dsl import In, llm, program, prompt

TEXT = (
    "Claude Monet was born in Paris in 1840. He was a painter; a whole movement of art has its name from a picture "
    "of his, of a harbour at sunrise. In his last years he hardly painted anything but the pond in his garden."
)

Short = Annotated[str, Field(min_length=1, max_length=40)]


class Person(BaseModel):
    """What to find in the text."""

    name: Short
    city: Short
    born_year: Annotated[int, Field(ge=1000, le=2100)]
    field: Literal["science", "mathematics", "art", "politics", "other"]


@llm(system="You copy facts from a text into JSON.", max_tokens=120, temperature=0)
async def extract(text: In[str]) -> Person:
    return prompt(
        f"{text}\n\nWho is this text about? Give the name, the city of birth, the year of birth and the field."
    )


@program
async def main(text: str = TEXT) -> Person:
    """The person that a text is about."""
    return await extract(text)
