"""Best of n: several samples of one prompt, and a choice between them.

Try `treadle run examples/best_of_n.py`, or `treadle run examples/best_of_n.py "a lighthouse"`.

`.n(4)` computes the prompt once; the four samples fork it. `.best(key=...)` keeps the sample that a plain function
likes most, here the one with the most different words. `.vote()` keeps the most frequent, which needs an answer with
few possible values. A model of 135M parameters writes slogans that are grammatical and seldom good, and a choice of four
is visibly better than one; its votes are close to what it would say at temperature 0.
"""

from typing import Literal, TypedDict

from treadle.dsl import llm, program, prompt

Mood = Literal["cheerful", "calm", "serious"]


class Campaign(TypedDict):
    """What `main` returns."""

    slogan: str
    rejected: list[str]
    mood: Mood


@llm(max_tokens=24, temperature=0.9, top_p=0.95, seed=7, stop="\n")
async def slogan(subject: str) -> str:
    return prompt(f"Write an advertising slogan of at most ten words for {subject}.")


@llm(max_tokens=8, temperature=0.9, seed=7)
async def mood(subject: str) -> Mood:
    return prompt(f"Which mood should an advertisement for {subject} have: cheerful, calm or serious?")


def variety(text: str) -> int:
    """How many different words there are."""
    return len(set(text.lower().split()))


@program
async def main(subject: str = "a small bakery by the sea") -> Campaign:
    """The best of four slogans, and the mood that most of four samples choose."""
    slogans = slogan.n(4)(subject)
    moods = mood.n(4)(subject)
    best = await slogans.best(key=variety)
    return {
        "slogan": best,
        "rejected": [other for other in await slogans if other != best],
        "mood": await moods.vote(),
    }
