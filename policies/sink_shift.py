"""A sink that moves along (Deep Forcing, arXiv 2512.05081, section 4)."""

from dataclasses import dataclass

from kvpack.memory.roles import Layout, Placement, Reindexer


@dataclass(frozen=True)
class SinkShiftReindexer(Reindexer):
    """Moves the sink so that it ends where the oldest other kept frame begins; all else stays absolute."""

    name = "sink-shift"

    def place(self, layout: Layout) -> Placement:
        """Place the sink right before the oldest kept frame."""
        chunk_start = layout.frames.new_full((layout.frames.shape[0],), float(layout.chunk_first_frame))
        starts = layout.first_frames.clone()
        sink = layout.columns("sink")
        if "sink" in layout.parts:
            others, last = starts[:, sink.stop :], sink.stop - 1
            oldest = others.amin(dim=1) if others.shape[1] else chunk_start
            sink_stop = starts[:, last] + layout.frames[:, last]
            # RoPE is relative: moving the sink alone closes the gap behind it.
            starts[:, sink] += (oldest - sink_stop)[:, None]
        return Placement(starts, layout.frames, chunk_start)
