"""`treadle key` writes entries that a keys file may hold."""

from __future__ import annotations

import pytest

from treadle.runtime.cli.main import main
from treadle.runtime.server.tenants import Tenants


def test_an_entry_is_one_that_the_server_reads(capsys, tmp_path):
    assert main(["key", "research"]) == 0
    out, err = capsys.readouterr()
    (tmp_path / "keys.toml").write_text(out)
    key = err.strip().rpartition(" ")[2]
    assert Tenants(tmp_path / "keys.toml").authenticate(f"Bearer {key}").name == "research"


@pytest.mark.parametrize("name", ["", "a b", 'a"\nis_admin = true\n#', "x" * 65, "-a"])
def test_a_name_that_no_tenant_may_have_is_refused(name, capsys):
    assert main(["key", "--", name]) == 1
    out, err = capsys.readouterr()
    assert not out and "no name for a tenant" in err
