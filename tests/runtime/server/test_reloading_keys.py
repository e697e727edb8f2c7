"""SIGHUP has a server that runs read its keys again."""

import asyncio
import os
import signal

import httpx
from live.server import running_server

from treadle.runtime.server.tenants import key_digest, new_key


async def test_sighup_reads_the_keys_again_and_a_faulty_file_changes_nothing(tmp_path):
    first, second, file = new_key(), new_key(), tmp_path / "keys.toml"

    def write(key):
        file.write_text(f'[[tenants]]\nname = "alice"\nkeys = ["{key_digest(key)}"]')

    write(first)
    flags = ["--keys", str(file), "--engine", "in-process", "--kv-pages", "64"]
    async with running_server("random:tiny-llama", flags) as server, httpx.AsyncClient() as client:

        async def status(key):
            answer = await client.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            return answer.status_code

        async def until_known(key):
            async with asyncio.timeout(20):
                while await status(key) != 200:
                    await asyncio.sleep(0.05)

        await until_known(first)
        write(second)
        os.kill(server.pid, signal.SIGHUP)
        await until_known(second)
        assert await status(first) == 401
        file.write_text("nonsense")
        os.kill(server.pid, signal.SIGHUP)
        await asyncio.sleep(0.5)
        assert (await status(second), await status(first)) == (200, 401)
