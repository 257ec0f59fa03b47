import pytest

from kvpack.adapters.wan.vae import StreamingDecoder


@pytest.fixture
def decoded(monkeypatch):
    """Latent frames that were decoded."""
    counts, call = [], StreamingDecoder.__call__

    def counting(self, latents):
        counts.append(latents.shape[2])
        return call(self, latents)

    monkeypatch.setattr(StreamingDecoder, "__call__", counting)
    return counts
