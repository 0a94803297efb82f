"""Which parameters train: freeze and thaw, and BatchNorm that stays in eval mode."""
