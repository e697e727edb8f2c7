"""What checkers must report: the lines that end in `# error` or, for one of them, `# error: pyright`; no others."""

from pydantic import BaseModel

from treadle.dsl import Chat, In, Var, compile, llm, program, prompt, tool


class Answer(BaseModel):
    score: float


@llm
async def write(topic: str, style: str = "plain") -> str:
    return prompt(f"Write about {topic}, {style}")


@llm
async def review(draft: In[str]) -> Answer:
    return prompt(f"Review {draft}")


@llm
async def wrong_value(draft: str) -> int:
    return "no number"  # error


@tool
async def search(query: str, limit: int = 5) -> list[str]:
    return [query] * limit


@tool(effects="never")  # error
def add(a: int) -> int:
    return a


@llm(temprature=0)  # error
async def misspelt(text: str) -> str:
    return prompt(text)


@program
async def report(topic: str) -> Answer:
    write(1)  # error
    write(topic, stile="brief")  # error
    write()  # error
    write(write(topic))  # error
    review(review("text"))  # error
    search("q", limit="5")  # error
    write.using(max_token=5)  # error
    write.map([1])  # error: pyright
    await write.preview(1)  # error
    write.n(2)(1)  # error
    text: int = await write(topic)  # error
    answer: Answer = review("text")  # error
    print(text)
    return answer


async def misuse(draft: Var[str], score: Var[float], answer: Var[Answer]) -> None:
    for _ in draft:  # error
        pass
    draft[0]  # error
    len(draft)  # error
    "x" in draft  # error
    score > 1  # error
    score + 1  # error
    answer.score  # error
    Chat(returns=Answer, system=1)  # error
    Chat(tools=[misuse])  # error
    compile(report, 1)  # error


async def branch(flag: Var[bool]) -> None:
    if flag:  # error: pyright
        pass


async def loop(flag: Var[bool]) -> None:
    while not flag:  # error: pyright
        pass
