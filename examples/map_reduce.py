"""Map and reduce: each paragraph is summarised by a call of its own, then the summaries by one more.

Try `treadle run examples/map_reduce.py`, or give your own paragraphs, each as one argument:
`treadle run examples/map_reduce.py "First paragraph." "Second paragraph."`

The calls of `.map` are decoded together, as one batch. Their summaries go into the last call as variables, so that it
starts by itself when they are there. A model of 135M parameters keeps the topic of a plain paragraph and some
of its facts; by the summary of summaries a fact or two is lost or wrong.
"""

from typing import TypedDict

from treadle.dsl import VarList, llm, program, prompt

PARAGRAPHS = (
    "Honey bees live in colonies of up to sixty thousand insects. A colony has one queen, who lays all of the eggs. "
    "The workers are her daughters: they clean the hive, feed the young and collect nectar from flowers.",
    "A bee that has found flowers tells the others where they are by dancing on the comb. The direction of her dance "
    "gives the direction of the flowers, and its length gives their distance.",
    "In winter bees do not sleep. They form a ball around the queen, shiver to keep it warm, and live on the honey "
    "that they stored in summer. A hive needs about twenty kilograms of it.",
)


class Summary(TypedDict):
    """What `main` returns."""

    parts: list[str]
    whole: str


@llm(max_tokens=50, temperature=0)
async def summarise(paragraph: str) -> str:
    return prompt(f"{paragraph}\n\nRewrite this in one short sentence.")


@llm(max_tokens=100, temperature=0)
async def combine(parts: VarList[str]) -> str:
    return prompt(f"Rewrite these notes as one short paragraph.\n\n{parts}")


@program
async def main(*paragraphs: str) -> Summary:
    """A sentence for each paragraph, and a paragraph for all of them."""
    parts = summarise.map(paragraphs or PARAGRAPHS)
    whole = combine(parts)
    return {"parts": await parts, "whole": await whole}
