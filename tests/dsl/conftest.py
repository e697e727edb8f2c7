import pytest
from support.fake_backend import FakeBackend

from treadle.dsl import use_backend


@pytest.fixture
def backend():
    """A backend whose model repeats the last line of its prompt; set `backend.model` for another."""
    return FakeBackend(lambda text: text.splitlines()[-1].removeprefix("user: "))


@pytest.fixture(autouse=True)
def scope(backend):
    with use_backend(backend):
        yield
