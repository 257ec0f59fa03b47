"""Eight clients of a server in a process of its own: p95 of what a client waits for a chunk, and frames compared.

python load.py --seconds 120
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
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = kvpack.enable(load_pipeline(shipped_folder(), torch.float32, "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    budget = given.fit * session_bytes(pipeline, shipped_folder(), 120)
    users = [(PROMPTS[index % len(PROMPTS)], index) for index in range(given.clients)]
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=f"http://127.0.0.1:{given.port}", timeout=60, trust_env=False) as client,
    ):
        server, sizes = started(Path(folder), budget, given.port, client), list[float]()
        names = [client.post("/sessions", json={"prompt": it, "seed": seed}).json()["session"] for it, seed in users]
        end, made = time.monotonic() + given.seconds, {name: list[tuple[float, str]]() for name in names}

        def run(name: str) -> None:
            while time.monotonic() < end:
                made[name].append(ask(client, name, len(made[name])))

        with ThreadPoolExecutor(given.clients + 1) as threads:
            for name in names:
                threads.submit(run, name)
            while time.monotonic() < end:
                time.sleep(given.seconds / 20)
                sizes.append(resident_mb(server.pid))
        before = {name: len(each) for name, each in made.items()}
        waits = [wait for each in made.values() for wait, _ in each]
        for kill in (signal.SIGTERM, signal.SIGKILL):  # the second comes right behind what SAVE_EVERY has saved
            os.kill(server.pid, kill)
            server.wait()
            server = started(Path(folder), budget, given.port, client)
            for name in names:
                number = client.get("/sessions").json()["sessions"][name]["chunks"]
                del made[name][number:]
                made[name].append(ask(client, name, number))
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
        "p50_wait_seconds": round(float(np.percentile(waits, 50)), 3),
        "p95_wait_seconds": round(float(np.percentile(waits, 95)), 3),
        "resident_mb": [round(sizes[len(sizes) // 2]), round(sizes[-1])],
        "clients_with_the_frames_of_their_single_run": sum(right),
    }
    print(json.dumps(said, indent=2))  # noqa: T201
    raise SystemExit(not all(right))


if __name__ == "__main__":
    main()
