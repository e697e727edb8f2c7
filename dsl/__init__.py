"""What people write: typed calls of a model and tools, joined by variables into programs."""

from treadle.dsl.backend import Backend, use_backend
from treadle.dsl.program import Program, current_program
from treadle.dsl.scope import program
from treadle.dsl.var import In, Var, value
from treadle.dsl.varlist import VarList

__all__ = ["Backend", "In", "Program", "Var", "VarList", "current_program", "program", "use_backend", "value"]
