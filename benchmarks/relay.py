"""A TCP forwarder on 127.0.0.1 that delays each direction, for latency without another machine.

    python -m benchmarks.relay --listen 7001 --to 7000 --delay-ms 50

A Petals server has to announce the relay's port, or clients learn the server's own and go around:

    with relay(to=7000, delay_ms=50) as port:
        with private_swarm(ServeConfig(model, port=7000, announce_ports=[port])) as swarm: ...

The delay is constant and keeps the order of the bytes; bandwidth is not limited. A connection
costs its TCP handshake without delay, because the relay answers it itself.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 1 << 16


@contextmanager
def relay(*, to: int, listen: int = 0, delay_ms: float) -> Iterator[int]:
    """Forwards 127.0.0.1:`listen` (0: a free port) to 127.0.0.1:`to`; yields the listening port.

    delay_ms: added in each direction, so a round trip takes twice as much longer.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="relay", daemon=True)
    thread.start()
    try:
        serving = _listen(listen, to, delay_ms / 1000)
        server = asyncio.run_coroutine_threadsafe(serving, loop).result()
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _listen(listen: int, to: int, delay_s: float) -> asyncio.Server:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to)
        except OSError:
            writer.close()  # nobody there: the client sees the connection end
            return
        await asyncio.gather(
            _forward(reader, far_writer, delay_s), _forward(far_reader, writer, delay_s)
        )

    return await asyncio.start_server(connect, "127.0.0.1", listen)


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    """One direction: what is read goes out `delay_s` later, while reading goes on."""
    clock = asyncio.get_running_loop().time
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def read() -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(_CHUNK_BYTES):
                under_way.put_nowait((clock() + delay_s, chunk))
        under_way.put_nowait((clock() + delay_s, b""))  # the end takes its time too

    reading = asyncio.create_task(read())
    try:
        while True:
            due, chunk = await under_way.get()
            await asyncio.sleep(max(0.0, due - clock()))
            if not chunk:
                break
            writer.write(chunk)
            await writer.drain()
    except ConnectionError:
        pass  # the receiver is gone
    finally:
        reading.cancel()
        writer.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay", description="Delays TCP connections on 127.0.0.1."
    )
    parser.add_argument("--listen", type=int, required=True, metavar="PORT")
    parser.add_argument("--to", type=int, required=True, metavar="PORT")
    parser.add_argument("--delay-ms", type=float, required=True, help="in each direction")
    args = parser.parse_args()
    with (
        suppress(KeyboardInterrupt),
        relay(listen=args.listen, to=args.to, delay_ms=args.delay_ms) as port,
    ):
        print(f"127.0.0.1:{port} -> 127.0.0.1:{args.to}, {args.delay_ms:g} ms each way", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
