"""VBench itself, where it is installed: the benchmark of the names that the measures here borrow (arXiv 2311.17982).

It differs from its own command line in two things: only dimensions that judge any video are asked, and nothing is
fetched; what isn't on the disk is named instead.
"""

import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from filecmp import cmp
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvpack.checkpoints.text import prompt_lines
from kvpack.errors import InvalidOptionError, KVPackError, OutputError

# What VBench 0.1 reads for each dimension, below its cache.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}
FORBIDDEN = "/\0"


def cache() -> Path:
    """Return the folder of VBench's weights: VBENCH_CACHE_DIR, or ~/.cache/vbench."""
    given = os.environ.get("VBENCH_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "vbench"


def require_installed() -> None:
    """Check that VBench and its weights are there.

    Raises:
        KVPackError: if not; it names what is missing and how to get it.
    """
    if find_spec("vbench") is None:
        raise KVPackError(
            "--vbench needs the package vbench, which isn't installed; install it with: pip install vbench, "
            "or leave --vbench out for the measures that need no network"
        )
    missing = [name for names in WEIGHTS.values() for name in names if not (cache() / name).exists()]
    if missing:
        raise KVPackError(
            f"--vbench needs weights that aren't in {cache()}: {', '.join(missing)}; run "
            f"'vbench evaluate --load_ckpt_from_local True --mode=custom_input --dimension {' '.join(WEIGHTS)} "
            "--videos_path DIR' once where there is a network, or set VBENCH_CACHE_DIR to where they are"
        )


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, one a line; empty lines are skipped.

    Raises:
        InvalidOptionError: if it can't be read as text, or a prompt can't be part of a file's name.
    """
    prompts = [line for _, line in prompt_lines(path)]
    for prompt in prompts:
        if any(character in prompt for character in FORBIDDEN) or len(prompt.encode()) > 240:
            raise InvalidOptionError(
                f"a prompt becomes a file's name and must have at most 240 bytes and no slash, got {prompt!r}"
            )
    return prompts


def lay_out(videos: Sequence[Path], prompts: Sequence[str], folder: Path) -> list[Path]:
    """Copy mp4 files as VBench names them, "{prompt}-{index}.mp4", counting the videos of equal prompts from 0.

    Raises:
        InvalidOptionError: if there aren't as many prompts as videos, or a video isn't an mp4 file.
        OutputError: if the folder can't be written, or holds other videos.
    """
    if len(videos) != len(prompts):
        raise InvalidOptionError(
            f"every video needs its prompt, one a line in the same order, got {len(videos)} videos and "
            f"{len(prompts)} prompts"
        )
    for video in videos:
        if not video.is_file() or video.suffix.lower() != ".mp4":
            raise InvalidOptionError(f"VBench reads mp4 files, got {video}; give one that exists")
    counted: Counter[str] = Counter()
    made = {}
    for video, prompt in zip(videos, prompts, strict=True):
        made[folder / f"{prompt}-{counted[prompt]}.mp4"] = video
        counted[prompt] += 1
    for path in folder.glob("*.mp4"):
        if path not in made or not cmp(path, made[path], shallow=False):
            raise OutputError(f"{folder} holds {path.name}, which VBench would judge too; give an empty --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target, video in made.items():
            if not target.exists():
                shutil.copyfile(video, target)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; give a writable directory") from error
    return list(made)


def run(folder: Path, device: str) -> dict[str, float]:
    """Run VBench on the videos of a folder, and return its scores by dimension.

    Its own files go to the folder `<name>-vbench` beside it.

    Raises:
        KVPackError: if VBench or its weights are missing.
    """
    require_installed()
    module: Any = importlib.import_module("vbench")
    results = folder.with_name(f"{folder.name}-vbench")
    full = Path(module.__file__).with_name("VBench_full_info.json")
    judge = module.VBench(device, str(full), str(results))
    judge.evaluate(
        videos_path=str(folder), name="kvpack", dimension_list=list(WEIGHTS), local=True, mode="custom_input"
    )
    found = json.loads((results / "kvpack_eval_results.json").read_text())
    return {name: float(value[0]) for name, value in found.items()}
