"""`treadle demo`: a small program on a real model, live."""

from __future__ import annotations

import argparse
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from treadle.dsl import In, llm, program, prompt, tool, value
from treadle.runtime.cli.options import DEFAULT_MODEL, MODEL_HELP, Commands, add_engine_options
from treadle.runtime.cli.run import run_workflow

REVIEWS = (
    "The loom arrived quickly and works perfectly. I love weaving on it every day.",
    "Terrible. The treadle broke after two days and nobody answered my letters.",
    "A fine machine for the price, and my children like it too.",
)


class Order(BaseModel):
    """What a customer wants. The shape is guaranteed; the truth is up to the model."""

    item: Literal["loom", "shuttle", "yarn"]
    quantity: Annotated[int, Field(ge=1, le=99)]


@llm(max_tokens=40)
async def read_order(letter: str) -> Order:
    return prompt(f"A customer writes: {letter}\nAnswer with the item and the quantity as JSON.")


@llm(max_tokens=8)
async def judge(review: str) -> Literal["positive", "negative"]:
    return prompt(f"Review: {review}\nIs this review positive or negative? Answer with one word.")


@llm(max_tokens=48)
async def reply(order: In[Order], price: In[float]) -> str:
    wanted = await value(order)
    return prompt(
        "Rewrite as one friendly sentence to a customer: "
        f"Your order of {wanted.quantity} {wanted.item} costs {price} dollars."
    )


@tool(effects="read", typical="10ms")
def price_of(order: Order) -> float:
    """Looks up what an order costs.

    Args:
        order: Item and quantity.
    """
    return {"loom": 420.0, "shuttle": 12.5, "yarn": 3.75}[order.item] * order.quantity


class Summary(BaseModel):
    """What the demo prints."""

    order: Order
    price: float
    reply: str
    reviews: list[Literal["positive", "negative"]]


async def demo(letter: str = "Please send me 2 looms.") -> Summary:
    """An order is read, priced by a tool and answered, while reviews are judged beside it, all in one batch."""
    async with program("demo"):
        verdicts = judge.map(REVIEWS)
        order = read_order(letter)
        price = price_of(order)  # type: ignore[arg-type]
        answer = reply(order, price)
        return Summary(order=await order, price=await price, reply=await answer, reviews=list(await verdicts))


def add_command(commands: Commands) -> None:
    """Adds `demo` to the command line."""
    parser = commands.add_parser("demo", help="run a small program on a real model, live")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})")
    parser.add_argument("--json", action="store_true", help="print one JSON object: result, account and graph")
    add_engine_options(parser)
    parser.set_defaults(run=run, mermaid=True)


def run(args: argparse.Namespace) -> int:
    """Runs the demo and prints its graph, its result and its account."""
    return run_workflow(args, demo, [])
