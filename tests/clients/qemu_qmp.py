"""Drives a VM's QMP socket with the published client `qemu.qmp`: sys.argv[1] is the socket.

Prints one line per step; any failure is an exception and a non-zero status.
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def event(listener, name):
    while True:
        message = await asyncio.wait_for(listener.get(), 20)
        if message["event"] == name:
            assert "timestamp" in message, message
            print("event", name, flush=True)
            return


async def main():
    client = QMPClient("test")
    with client.listener() as listener:
        await client.connect(sys.argv[1])
        assert (await client.execute("query-version"))["qemu"]["major"] >= 1
        commands = {entry["name"] for entry in await client.execute("query-commands")}
        for wanted in ["quit", "stop", "cont", "query-status", "system_reset", "system_powerdown", "query-cpus-fast"]:
            assert wanted in commands, wanted
        status = await client.execute("query-status")
        assert status["running"] is True and status["status"] == "running", status
        cpus = await client.execute("query-cpus-fast")
        assert len(cpus) == 1 and cpus[0]["thread-id"] > 1, cpus
        await client.execute("stop")
        await event(listener, "STOP")
        status = await client.execute("query-status")
        assert status["running"] is False and status["status"] == "paused", status
        await client.execute("cont")
        await event(listener, "RESUME")
        await client.execute("system_reset")
        await event(listener, "RESET")
        try:
            await client.execute("no-such-command")
        except ExecuteError as error:
            assert error.error_class == "CommandNotFound", error.error_class
        else:
            raise AssertionError("an unknown command was taken")
        try:
            await client.execute("query-status", {"surplus": 1})
        except ExecuteError as error:
            assert error.error_class == "GenericError", error.error_class
        else:
            raise AssertionError("a surplus argument was taken")
        await client.execute("quit")
        await event(listener, "SHUTDOWN")
        try:
            await client.disconnect()
        except EOFError:
            pass  # the VM was faster
    print("qemu.qmp: all well")


asyncio.run(main())
