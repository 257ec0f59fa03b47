"""One model family: which pipelines, what geometry and costs, and what class drives a generation."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, ClassVar

import torch

from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.generation.compile_boundary import compiled_from
from kvpack.generation.run import Run
from kvpack.generation.trainee import Trainee
from kvpack.memory.base import Memory
from kvpack.memory.costs import LatentShape, ModelCost
from kvpack.memory.geometry import Geometry
from kvpack.memory.shard import Shard

_OPEN_ENDED = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


class Adapter(ABC):
    """What kvpack must know of a model family; without state, shared by all its pipelines."""

    name: ClassVar[str]
    #: Classes of the pipelines that it drives, whose subclasses it drives too.
    pipelines: ClassVar[tuple[type, ...]]
    #: One generation of such a pipeline.
    run_class: ClassVar[type[Run]]
    #: Arguments, with their defaults, that an enabled pipeline's call takes beside those of the stock one.
    extra_arguments: ClassVar[Mapping[str, Any]] = {}
    #: What training does with such a pipeline, made of adapter, pipeline and text tokens; None if nobody trains it.
    trainee_class: ClassVar[Callable[..., Trainee] | None] = None
    #: Whether another transformer may commit in the place of the pipeline's own.
    takes_writer: ClassVar[bool] = False

    @abstractmethod
    def check(self, pipeline: Any) -> None:
        """Raise `UnsupportedPipelineError` if something is switched on that cannot work."""

    @staticmethod
    def configs(pipeline: Any) -> dict[str, Mapping[str, Any]]:
        """Return the configs of a pipeline's components; those of transformers' models are of another kind."""
        configs = {name: getattr(part, "config", None) for name, part in pipeline.components.items()}
        return {name: config for name, config in configs.items() if isinstance(config, Mapping)}

    def default_options(self, configs: Mapping[str, Mapping[str, Any]], stack: str) -> Mapping[str, Any]:
        """Return options for a stack by name, where the user gives none; those it does not take are left out.

        Args:
            configs: the components' configs.
            stack: name of the stack.
        """
        return {}

    def checked_writer(self, pipeline: Any, writer: Any) -> Any:
        """Return a transformer that may commit in the place of the pipeline's own.

        Raises:
            UnsupportedPipelineError: if the family has no such place.
            InvalidOptionError: if it is of another size or dtype than the pipeline's own.
        """
        if not self.takes_writer:
            raise UnsupportedPipelineError(f"{self.name} commits with the pipeline's own transformer; leave writer out")
        wanted, given = _described(pipeline.transformer), _described(writer)
        for what, value in wanted.items():
            if given.get(what) != value:
                raise InvalidOptionError(
                    f"the writer's {what} is {given.get(what)!r}, but that of the pipeline's transformer is {value!r}; "
                    "give a transformer of the same config and dtype"
                )
        return writer

    def check_stack(self, pipeline: Any, stack: Memory) -> None:  # noqa: B027  # a family may have nothing to check
        """Raise `InvalidOptionError` if the stack cannot work with this pipeline's model."""

    @abstractmethod
    def geometry(
        self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int, dtype: torch.dtype
    ) -> Geometry:
        """Return the geometry from the components' configs, for a video of `height` x `width` pixels."""

    @abstractmethod
    def forward_flops(self, configs: Mapping[str, Mapping[str, Any]], query_tokens: int, attended_tokens: int) -> int:
        """Return the floating-point operations of one forward of `query_tokens` that attends `attended_tokens`."""

    def temporal_scale(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Return the pixel frames of a latent frame, of which a video's first stands for one alone."""
        return int(configs["vae"].get("scale_factor_temporal", 4))

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]]) -> LatentShape | None:
        """Return what the cost of compressing latents depends on; None if nobody counts it."""
        return None

    def model_cost(self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int) -> ModelCost | None:
        """Return what planning a training on videos of `height` x `width` depends on; None if nobody counts it."""
        return None

    def shard(self, pipeline: Any) -> Shard | None:
        """Return the process's part of the model's heads; None where it has all."""
        return None

    def memories(self, pipeline: Any) -> int:
        """Return the sessions of a guidance branch: one for each transformer that takes part in the steps."""
        return 1

    def run(self, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool) -> Run:
        """Start a generation; arguments are those of `Run`."""
        self.check(pipeline)  # before anything is encoded
        return self.run_class(self, pipeline, stack, arguments, streaming=streaming)

    def checkpoint_layout(self) -> tuple[Callable[..., dict[str, Any]], Callable[..., Any]]:
        """Return what renames a research checkpoint's weights for diffusers, and what builds a model of them.

        Raises:
            UnsupportedPipelineError: unless an adapter says otherwise.
        """
        raise UnsupportedPipelineError(f"the adapter {self.name} knows no research checkpoints")

    def trainee(self, pipeline: Any, max_sequence_length: int | None = None) -> Trainee:
        """Return what training does with this pipeline.

        Args:
            pipeline: the pipeline.
            max_sequence_length: text tokens; the pipeline's own default if None.

        Raises:
            UnsupportedPipelineError: if the family has none.
        """
        if self.trainee_class is None:
            raise UnsupportedPipelineError(f"the adapter {self.name} cannot train yet; it has no `trainee_class`")
        self.check(pipeline)
        return self.trainee_class(self, pipeline, max_sequence_length)


def call_signature(pipeline: type) -> inspect.Signature:
    """Return what a pipeline class's call takes by name.

    Raises:
        UnsupportedPipelineError: if it takes `*args` or `**kwargs`: what it makes of them, and which defaults it sets
            itself, is not known before a chunk is made; or if it lacks an argument of the diffusers class behind it.
    """
    # Bound, so that `self` is none of them; of an enabled class it is that of the stock call, which it wraps.
    signature = inspect.signature(MethodType(pipeline.__call__, pipeline))
    if open_ended := [str(each) for each in signature.parameters.values() if each.kind in _OPEN_ENDED]:
        raise UnsupportedPipelineError(
            f"{pipeline.__name__}.__call__ takes {' and '.join(open_ended)}, of which kvpack cannot know what becomes; "
            "name its arguments, as the class does that it derives from"
        )
    # Whose arguments `stock_call` sets.
    stock = next((each for each in pipeline.__mro__ if each.__module__.startswith("diffusers.")), pipeline)
    taken = inspect.signature(MethodType(stock.__call__, stock)).parameters.values()
    named = [each.name for each in taken if each.kind not in _OPEN_ENDED]
    if lacking := [name for name in named if name not in signature.parameters]:
        raise UnsupportedPipelineError(
            f"{pipeline.__name__}.__call__ lacks {', '.join(lacking)} of {stock.__name__}.__call__; hand them on"
        )
    return signature


def _described(transformer: Any) -> dict[str, Any]:
    """Return class, dtype and config of a transformer, compiled or not, but for names that are private."""
    transformer = compiled_from(transformer)
    # Private ones say where it was loaded from, and by which version.
    config = {name: value for name, value in getattr(transformer, "config", {}).items() if not name.startswith("_")}
    return {"class": type(transformer).__name__, "dtype": getattr(transformer, "dtype", None), **config}
