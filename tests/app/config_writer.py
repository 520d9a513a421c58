"""A process that forks writers of a definition, for test_kills.py: everything is imported once.

`config_writer.py DOMAIN`, then on stdin `loop` or `once`: a line with the writer's pid comes back.
It begins at `go`, and a line that tells how it ended follows (`end STATUS`).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys

import qmpvcpu

#: prctl(2): any process may trace this one, where Yama allows only parents.
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, -1


async def write(name: str, enabled: bool) -> None:
    async with qmpvcpu.connect(name) as domain:
        await (domain.enable if enabled else domain.disable)(1, config=True)


async def loop(name: str) -> None:
    enabled = True
    async with qmpvcpu.connect(name) as domain:
        while True:
            await (domain.enable if enabled else domain.disable)(1, config=True)
            enabled = not enabled


def child(mode: str, name: str, go: int) -> None:
    ctypes.CDLL(None).prctl(
        PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY & 0xFFFFFFFFFFFFFFFF), 0, 0, 0
    )
    os.read(go, 1)
    asyncio.run(loop(name) if mode == "loop" else write(name, enabled=True))


def main(name: str) -> None:
    asyncio.run(write(name, enabled=True))
    asyncio.run(write(name, enabled=False))
    print("ready", flush=True)
    pid = go_read = go_write = 0
    for line in sys.stdin:
        word = line.strip()
        if word == "go":
            os.write(go_write, b"g")
            _, status = os.waitpid(pid, 0)
            os.close(go_write)
            os.close(go_read)
            print("end", status, flush=True)
            continue
        # A pipe for each: one that was killed before it read its word leaves none to the next.
        go_read, go_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(word, name, go_read)
            finally:
                os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
