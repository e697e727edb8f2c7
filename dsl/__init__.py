"""What people write: typed calls of a model and tools, joined by variables into programs."""

from treadle.dsl.backend import Backend, use_backend
from treadle.dsl.chat import Chat
from treadle.dsl.compile import compile
from treadle.dsl.gather import gather
from treadle.dsl.graph import Graph
from treadle.dsl.llm import llm
from treadle.dsl.program import Program, current_program
from treadle.dsl.prompt import Message, ToolCall, prompt
from treadle.dsl.samples import Samples
from treadle.dsl.scope import program
from treadle.dsl.tool import Tool, tool
from treadle.dsl.turn import Turn
from treadle.dsl.var import In, Var, value
from treadle.dsl.varlist import VarList

__all__ = [
    "Backend",
    "Chat",
    "Graph",
    "In",
    "Message",
    "Program",
    "Samples",
    "Tool",
    "ToolCall",
    "Turn",
    "Var",
    "VarList",
    "compile",
    "current_program",
    "gather",
    "llm",
    "program",
    "prompt",
    "tool",
    "use_backend",
    "value",
]
