"""The toy world: rendered clips, a tiny Wan pipeline trained on them, and the measures that judge it."""
