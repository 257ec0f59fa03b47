"""Write the trained parts as a normal diffusers folder that `WanPipeline.from_pretrained` loads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from benchmarks.toyworld import chunked, store, text, vae_full
from kvpack.checkpoints.config import Settings
from kvpack.shipped import CALL, FPS, STACK_OPTIONS, TRAINING

CARD = Path(__file__).with_name("model_card.md")


def write(folder: Path, vae: AutoencoderKLWan, model: WanTransformer3DModel, encoder: UMT5EncoderModel) -> None:
    """Write the whole pipeline beside the folder, then put it in its place."""
    pipe = WanPipeline(
        tokenizer=text.build_tokenizer(),
        text_encoder=encoder,
        vae=vae,
        # Wan's own solver: its 4 steps are as good as 8 of Euler's.
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=model,
    )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    pipe.save_pretrained(part)
    options = {**TRAINING, **STACK_OPTIONS["packforcing"]}
    Settings(fps=float(FPS), options=options, call={**CALL, "num_inference_steps": 6}).write(part)
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)
    if CARD.exists():
        shutil.copy(CARD, part / "README.md")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def parts(out: Path) -> tuple[AutoencoderKLWan, WanTransformer3DModel, UMT5EncoderModel]:
    """Return models with the averaged weights of the last checkpoints; a part that is not trained yet is random."""
    vae, model, encoder = vae_full.build(), chunked.build(), text.build_encoder()
    if (out / "vae").exists():
        # copied, because a loaded model would write down where it was loaded from
        trained = AutoencoderKLWan.from_pretrained(out / "vae")
        vae.load_state_dict(trained.state_dict())
        vae.register_to_config(latents_mean=trained.config.latents_mean, latents_std=trained.config.latents_std)
    elif (state := store.load(out / "vae.pt")) is not None:
        vae.load_state_dict(state["model"])
    if (state := store.load(out / "transformer.pt")) is not None:
        model.load_state_dict(state["ema"]["model"])
        encoder.load_state_dict(state["ema"]["encoder"])
    return vae.eval(), model.eval(), encoder.eval()


def main() -> None:
    """Export the last checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=store.RUNS / "lit")
    parser.add_argument("--to", type=Path, default=None, help="default: pipeline/ in the run's folder")
    args = parser.parse_args()
    target = args.to or args.out / "pipeline"
    write(target, *parts(args.out))
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
