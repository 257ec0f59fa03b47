"""The HTTP side: sessions by POST, chunks and fragmented mp4 out, metrics, and a stop that saves all.

python server.py --folder sessions --budget-mb 64
"""

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import av
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from hosting import FullError, GoneError, Host, WrongChunkError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from kvpack.errors import KVPackError
from kvpack.media.video import CODECS
from kvpack.shipped import shipped_folder

logger = logging.getLogger("uvicorn.error")
STATUS: dict[type[Exception], int] = {FullError: 503, GoneError: 404, WrongChunkError: 409, KVPackError: 422}


class Beginning(BaseModel):
    """What a session begins with."""

    prompt: str = Field(max_length=2000)
    seed: int = Field(0, ge=0, lt=2**63)


class Change(BaseModel):
    """What a session goes on with: another prompt, another scene, or both."""

    prompt: str | None = Field(None, max_length=2000)
    cut: bool = False


class Fragments:
    """Frames to fragments of an mp4, which play as they come.

    Args:
        fps: frames a second.
    """

    def __init__(self, fps: float) -> None:
        self._out, self._fps, self._stream = bytearray(), Fraction(fps).limit_denominator(1001), None
        flags = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(self, "w", format="mp4", options=flags)

    def write(self, data: bytes) -> int:
        """Take bytes of the container; it does not seek."""
        self._out += data
        return len(data)

    def add(self, frames: Any) -> bytes:
        """Return the fragments of frames `[frames, height, width, 3]`, bytes; height and width are even."""
        if self._stream is None:
            codec = next(name for name in CODECS if name in av.codecs_available)
            self._stream = self._container.add_stream(codec, rate=self._fps)
            self._stream.height, self._stream.width, self._stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            if codec == "libx264":
                self._stream.options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            self._container.mux(self._stream.encode(picture))
        return self._taken()

    def end(self) -> bytes:
        """Return what is left; nothing if there was no frame."""
        if self._stream is None:
            return b""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._taken()

    def _taken(self) -> bytes:
        out, self._out = bytes(self._out), bytearray()
        return out


def app_of(host: Host) -> FastAPI:
    """Return the application around a host; its end saves all sessions."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidy = asyncio.create_task(_tidy(host))
        yield
        tidy.cancel()
        await asyncio.to_thread(host.stop)

    app = FastAPI(title="kvpack", lifespan=lifespan)
    for kind in STATUS:
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)

    @app.post("/sessions", status_code=201)
    async def begin(asked: Beginning) -> dict[str, str]:
        if host.stopping:
            raise HTTPException(503, "the server is stopping; come back later")
        return {"session": await asyncio.wrap_future(host.begin(asked.prompt, asked.seed))}

    @app.get("/sessions")
    async def sessions() -> dict[str, Any]:
        users = list(host.users.items())  # at once: the worker adds and removes some meanwhile
        each = {name: {"chunks": it.chunks, "in_memory": it.stream is not None} for name, it in users}
        return {"capacity": host.capacity, "session_bytes": host.session_bytes, "sessions": each}

    @app.post("/sessions/{name}/prompt", status_code=204)
    async def change(name: str, asked: Change) -> None:
        await asyncio.wrap_future(host.change(name, asked.prompt, asked.cut))

    @app.delete("/sessions/{name}", status_code=204)
    async def cancel(name: str) -> None:
        await asyncio.wrap_future(host.cancel(name))

    @app.get("/sessions/{name}/chunks/{number}")
    async def chunk(name: str, number: int) -> Response:
        _, frames = await asyncio.wrap_future(host.chunk(name, number))
        shape = ",".join(map(str, frames.shape))
        return Response(frames.tobytes(), media_type="application/octet-stream", headers={"X-Shape": shape})

    @app.get("/sessions/{name}/video.mp4")
    async def video(name: str, chunks: Annotated[int | None, Query(ge=0)] = None) -> StreamingResponse:
        host.user(name)
        parts = _video(host, name, chunks)
        first = await anext(parts, b"")  # what is refused is told before a stream begins

        async def whole() -> AsyncIterator[bytes]:
            yield first
            async for part in parts:
                yield part

        return StreamingResponse(whole(), media_type="video/mp4")

    @app.websocket("/sessions/{name}/live")
    async def live(socket: WebSocket, name: str) -> None:
        await socket.accept()
        fragments = Fragments(host.fps)
        with suppress(WebSocketDisconnect):  # also where the server stops
            try:
                while True:
                    asked = await _asked(socket)
                    if asked.prompt is not None or asked.cut:
                        await asyncio.wrap_future(host.change(name, asked.prompt, asked.cut))
                    _, frames = await asyncio.wrap_future(host.chunk(name))
                    await socket.send_bytes(await asyncio.to_thread(fragments.add, frames))
            except (*STATUS, ValueError) as error:
                await socket.close(1008, str(error)[:100])

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(host.metrics), media_type=CONTENT_TYPE_LATEST)

    return app


def _refused(_: Any, error: Exception) -> JSONResponse:
    status = next(code for kind, code in STATUS.items() if isinstance(error, kind))
    return JSONResponse({"detail": str(error)}, status)


def _invalid(_: Any, error: Any) -> JSONResponse:
    """Say what is wrong without what was given, which may be a text that no answer can hold: half a character."""
    return JSONResponse({"detail": [{"loc": each["loc"], "msg": each["msg"]} for each in error.errors()]}, 422)


async def _asked(socket: WebSocket) -> Change:
    """Return what a client sends next; a `ValueError` if it is nothing that can be asked for."""
    try:
        return Change.model_validate_json(await socket.receive_text())
    except KeyError as error:
        raise ValueError("a message is text, got bytes") from error


async def _video(host: Host, name: str, chunks: int | None) -> AsyncIterator[bytes]:
    """Yield the coming chunks as one mp4; it ends with the session, and where the server stops."""
    fragments, left = Fragments(host.fps), chunks
    with suppress(GoneError):
        while left != 0 and not host.stopping:
            _, frames = await asyncio.wrap_future(host.chunk(name))
            yield await asyncio.to_thread(fragments.add, frames)
            left = None if left is None else left - 1
    yield fragments.end()


async def _tidy(host: Host) -> None:
    while True:
        await asyncio.sleep(max(1.0, host.idle_seconds / 2))
        try:
            await asyncio.wrap_future(host.tidy())
        except Exception as error:  # e.g. a full disk: the sessions stay in memory, and the next turn tries again
            logger.warning("idle sessions could not be saved: %s", "; ".join(getattr(error, "__notes__", [str(error)])))


class Server(uvicorn.Server):
    """A server whose videos end at their next chunk when it is told to stop; uvicorn waits for them to end."""

    def __init__(self, config: uvicorn.Config, host: Host) -> None:
        super().__init__(config)
        self._host = host

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop."""
        self._host.stopping = True
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="folder of a diffusers pipeline (the shipped one)")
    parser.add_argument("--folder", type=Path, required=True, help="where sessions are saved, and found again")
    parser.add_argument("--budget-mb", type=float, required=True, help="for what all sessions remember")
    parser.add_argument("--idle-seconds", type=float, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the shipped model is too small for more")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = given.model or shipped_folder()
    host = Host(model, given.folder, given.budget_mb * 1e6, idle_seconds=given.idle_seconds, device=given.device)
    Server(uvicorn.Config(app_of(host), port=given.port, timeout_graceful_shutdown=60), host).run()


if __name__ == "__main__":
    main()
