"""Whether the kernels compile for an H200, and into what: no GPU is needed for either.

A folder's `variants_*.py` lists what its kernels ship as.
"""

from importlib.util import find_spec

from support.apart import run_apart

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_pyfunc_call(pyfuncitem):
    return run_apart(pyfuncitem, {"TRITON_INTERPRET": "0"})
