"""What diffusers and accelerate have put around the forwards of a model's parts."""

from torch import nn


def has_hooks(model: nn.Module) -> bool:
    """Return whether a part has a hook, which may move it, cast it or leave it out."""
    for own in map(vars, model.modules()):
        registry = own.get("_diffusers_hook")  # an empty one is on every model that was called by a pipeline
        if "_hf_hook" in own or (registry is not None and registry.hooks):
            return True
    return False
