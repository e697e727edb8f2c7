"""What the kernels compute, on a CPU: Triton's interpreter runs them, program after program, with numpy.

It knows float32, float16, int8 and e4m3; bfloat16 it gets wrong without saying so. A program takes about a
millisecond and a tile of attention five, so cases are small.
"""

from importlib.util import find_spec

from support.apart import run_apart

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_pyfunc_call(pyfuncitem):
    return run_apart(pyfuncitem, {"TRITON_INTERPRET": "1"})
