"""What a process knows of revoked certificates grows with every answer and survives a coordinator that is away."""

import asyncio
import json

from atoll.revocation import keep_informed


def test_serials_are_learned_and_kept_while_the_coordinator_is_away() -> None:
    big = (1 << 159) + 1
    answers = [json.dumps({"serials": ["7"]}), "not json", json.dumps({"serials": [str(big)]})]
    seen: list[bytes] = []

    async def story() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            if len(seen) > len(answers):
                asked_on.set()
            body = answers[min(len(seen), len(answers)) - 1]
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
            await writer.drain()
            writer.close()

        asked_on = asyncio.Event()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        revoked: set[int] = {3}
        informed = asyncio.create_task(keep_informed(revoked, f"http://127.0.0.1:{port}", "token", 0.01))
        async with asyncio.timeout(10):
            await asked_on.wait()
        server.close()
        await asyncio.sleep(0.05)
        informed.cancel()
        assert revoked == {3, 7, big}
        assert b"GET /v1/revoked" in seen[0]
        assert b"authorization: bearer token" in seen[0].lower()

    asyncio.run(story())
