"""Best of n: several samples of one prompt, and a choice between them.

Try `treadle run examples/best_of_n.py`, or `treadle run examples/best_of_n.py "a lighthouse"`.

`.n(4)` computes the prompt once; the four samples fork it. `.best(key=...)` keeps the sample that a plain function
likes most: here it has at most ten words, and of these the most different ones. `.vote()` keeps the most frequent one,
which needs an answer with few possible values. A model of 135M parameters writes slogans that sound like slogans and
mean little, often longer than asked: this is what choosing is for. Its votes say what it finds likely, no more.
"""

from typing import Literal, TypedDict

from treadle.dsl import llm, program, prompt

Mood = Literal["cheerful", "calm", "serious"]


class Campaign(TypedDict):
    """What `main` returns."""

    slogan: str
    rejected: list[str]
    mood: Mood


@llm(max_tokens=32, temperature=0.9, top_p=0.95, seed=7, stop="\n")
async def slogan(subject: str) -> str:
    return prompt(f"Write an advertising slogan of at most ten words for {subject}.")


@llm(max_tokens=8, temperature=0.9, seed=7)
async def mood(subject: str) -> Mood:
    return prompt(f"Which mood should an advertisement for {subject} have: cheerful, calm or serious?")


def quality(text: str) -> tuple[bool, int]:
    """Short ones first, then those with more different words."""
    words = text.lower().split()
    return 0 < len(words) <= 10, len(set(words))


@program
async def main(subject: str = "a small bakery by the sea") -> Campaign:
    """The best of four slogans, and the mood that most of four samples choose."""
    slogans = slogan.n(4)(subject)
    moods = mood.n(4)(subject)
    best = await slogans.best(key=quality)
    return {
        "slogan": best,
        "rejected": [other for other in await slogans if other != best],
        "mood": await moods.vote(),
    }
