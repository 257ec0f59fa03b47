"""Eight clients of a server in a process of its own: what they wait for a chunk, what it holds, and frames compared.

Behind the load the server is told to stop, and then killed, in the middle of the clients' chunks, and started again.

python load.py --seconds 600 --output server.json
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from hosting import session_bytes

import kvpack
from kvpack.pipeline.track import load_pipeline
from kvpack.shipped import shipped_folder

PROMPTS = ("a red circle", "a blue square", "a green circle", "a red circle bouncing over dusk rings")


def started(folder: Path, budget: float, port: int, client: httpx.Client) -> subprocess.Popen[bytes]:
    """Return a server that answers."""
    given = ["--folder", str(folder), "--budget-mb", str(budget / 1e6), "--port", str(port), "--idle-seconds", "2"]
    server = subprocess.Popen(  # noqa: S603
        [sys.executable, str(Path(__file__).with_name("server.py")), *given], stdout=subprocess.DEVNULL
    )
    for _ in range(600):
        try:
            client.get("/sessions")
            return server
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server does not answer")


def ask(client: httpx.Client, name: str, number: int) -> tuple[float, str]:
    """Return the seconds that a chunk took to come, and its digest; where nobody is idle it is asked for again."""
    start = time.monotonic()
    while (answer := client.get(f"/sessions/{name}/chunks/{number}")).status_code == 503:
        time.sleep(0.01)
    answer.raise_for_status()
    return time.monotonic() - start, sha256(answer.content).hexdigest()


def asked_again(client: httpx.Client, name: str, made: list[tuple[float, str]]) -> None:
    """Ask for chunks until the server is gone."""
    with suppress(httpx.HTTPError):
        while True:
            made.append(ask(client, name, len(made)))


def metric(client: httpx.Client, name: str) -> float:
    """Return what the server says of itself."""
    lines = client.get("/metrics").text.splitlines()
    return float(next(each for each in lines if each.startswith(f"kvpack_{name} ")).split()[1])


def resident_mb(process: int) -> float:
    """Return the resident set of a process (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(each for each in lines if each.startswith("VmRSS")).split()[1]) / 1e3


def single(pipeline: Any, prompt: str, seed: int, chunks: int) -> list[str]:
    """Return the digests of a single run."""
    noise = torch.Generator("cpu").manual_seed(seed)
    with pipeline.packforcing.stream(prompt=prompt, generator=noise, output_type="np") as stream:
        made = (np.round(next(stream)[0] * 255).astype(np.uint8) for _ in range(chunks))
        return [sha256(each.tobytes()).hexdigest() for each in made]


def main() -> None:
    """Print one JSON object; the exit status says whether all frames were right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--fit", type=int, default=8, help="sessions in memory at once")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output", type=Path, help="JSON file for what is printed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = kvpack.enable(load_pipeline(shipped_folder(), torch.float32, "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    budget = given.fit * session_bytes(pipeline, shipped_folder())
    users = [(PROMPTS[index % len(PROMPTS)], index) for index in range(given.clients)]
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=f"http://127.0.0.1:{given.port}", timeout=60, trust_env=False) as client,
    ):
        server, sizes = started(Path(folder), budget, given.port, client), list[list[float]]()
        names = [client.post("/sessions", json={"prompt": it, "seed": seed}).json()["session"] for it, seed in users]
        made = {name: list[tuple[float, str]]() for name in names}
        start = time.monotonic()

        def run(name: str) -> None:
            while time.monotonic() < start + given.seconds:
                made[name].append(ask(client, name, len(made[name])))

        with ThreadPoolExecutor(given.clients) as threads:
            asking = [threads.submit(run, name) for name in names]
            while time.monotonic() < start + given.seconds:
                time.sleep(given.seconds / 20)
                sizes.append(
                    [round(time.monotonic() - start), resident_mb(server.pid), metric(client, "held_bytes") / 1e6]
                )
        for each in asking:
            each.result()
        before = {name: len(each) for name, each in made.items()}
        waits = [wait for each in made.values() for wait, _ in each]
        lost = {}
        for kill in (signal.SIGTERM, signal.SIGKILL):
            with ThreadPoolExecutor(given.clients) as threads:
                for name in names:
                    threads.submit(asked_again, client, name, made[name])
                time.sleep(1)
                os.kill(server.pid, kill)
                server.wait()
            server = started(Path(folder), budget, given.port, client)
            found = {name: each["chunks"] for name, each in client.get("/sessions").json()["sessions"].items()}
            lost[kill.name] = [len(made[name]) - found[name] for name in names]
            for name in names:
                del made[name][found[name] :]
                made[name].append(ask(client, name, found[name]))
        server.terminate()
        server.wait()
    right = [
        [digest for _, digest in made[name]] == single(pipeline, *user, len(made[name]))
        for name, user in zip(names, users, strict=True)
    ]
    said = {
        "clients": given.clients,
        "fit": given.fit,
        "seconds": given.seconds,
        "chunks": sum(before.values()),
        "chunks_of_each": [min(before.values()), max(before.values())],
        "p50_wait_seconds": round(float(np.percentile(waits, 50)), 3),
        "p95_wait_seconds": round(float(np.percentile(waits, 95)), 3),
        "seconds_resident_mb_and_held_mb": [[round(each) for each in sample] for sample in sizes],
        "chunks_to_make_again": lost,
        "clients_with_the_frames_of_their_single_run": sum(right),
    }
    text = json.dumps(said)
    print(text)  # noqa: T201
    if given.output is not None:
        given.output.write_text(text + "\n")
    raise SystemExit(not all(right))


if __name__ == "__main__":
    main()
