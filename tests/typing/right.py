"""What checkers must accept, with the types that they must see. Checked by test_typing.py, never run."""

from typing import Literal, assert_type

from pydantic import BaseModel

from treadle.dsl import (
    Chat,
    In,
    Program,
    Samples,
    Turn,
    Var,
    VarList,
    compile,
    gather,
    llm,
    program,
    prompt,
    tool,
    value,
)


class Answer(BaseModel):
    score: float


@llm
async def write(topic: str, style: str = "plain") -> str:
    return prompt(f"Write about {topic}, {style}")


@llm(max_tokens=100, temperature=0, stop=["\n"])
async def review(draft: In[str]) -> Answer:
    return prompt([{"role": "user", "content": f"Review {draft}"}], system="Be strict.")


@llm
async def classify(text: In[str]) -> Literal["yes", "no"]:
    if not await value(text):
        return "no"
    return prompt(f"{text}?")


@llm
async def merge(notes: VarList[str], limit: int) -> list[Answer]:
    return prompt(f"{notes} {limit}")


@tool
async def search(query: str, limit: int = 5) -> list[str]:
    return [query] * limit


@tool(typical="2s", effects="read")
def add(a: In[int], b: int) -> int:
    return await_free(a) + b


def await_free(number: In[int]) -> int:
    return number if isinstance(number, int) else 0


@program
async def report(topic: str) -> Answer:
    draft = write(topic)
    assert_type(draft, Var[str])
    assert_type(review(draft), Var[Answer])
    assert_type(await review(draft), Answer)
    assert_type((await review(await draft)).score, float)
    assert_type(await classify(draft), Literal["yes", "no"])
    return await review.using(temperature=1)("text")


@program(deadline="20s", priority=1)
async def many(topics: list[str]) -> str:
    notes = write.map(topics, style="brief")
    assert_type(notes, VarList[str])
    assert_type(await notes, list[str])
    assert_type(notes[0], Var[str])
    assert_type(await merge(notes, limit=3), list[Answer])
    reviews = review.map(notes)
    assert_type(await reviews, list[Answer])
    assert_type(await review.map(["text"]), list[Answer])

    samples = review.n(3)(notes[0])
    assert_type(samples, Samples[Answer])
    assert_type(await samples, list[Answer])
    assert_type(await samples.first(), list[Answer])
    assert_type(await samples.best(key=lambda answer: answer.score), Answer)
    assert_type(await samples.vote(), Answer)

    pair = gather(notes[0], reviews[0])
    assert_type(pair, Var[tuple[str, Answer]])
    texts: tuple[str, ...] = await gather(*notes)
    text, answer = await pair
    assert_type(answer, Answer)
    assert_type(await value(notes[0]), str)
    return text + texts[0]


async def agent(question: str) -> Answer:
    async with program("agent", deadline=60, objective="latency") as p:
        assert_type(p, Program)
        assert_type(search(question), Var[list[str]])
        assert_type(await add(1, 2), int)
        assert_type(await add(add(1, 2), 2), int)
        chat = Chat("Use tools.", tools=[search, add], returns=Answer, max_tokens=10)
        assert_type(chat, Chat[Answer])
        turn = await chat.send(question, write("x"))
        assert_type(turn, Turn[Answer])
        while turn.calls:
            turn = await chat.run_tools(turn)
        assert_type(turn.answer, Answer)
        assert_type(await Chat().ask("hello"), str)
        return await chat.ask(question, max_steps=3)


async def main() -> None:
    assert_type(await report("looms"), Answer)
    assert_type(await many(["looms"]), str)
    print(compile(report, "looms").mermaid())
    print(await write.preview("looms", style="brief"))
    async for piece in write("looms").stream():
        assert_type(piece, str)
