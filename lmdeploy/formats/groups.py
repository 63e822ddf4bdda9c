"""How many inputs share a scale where a weight is rounded while it is loaded. Must not import torch: `lmdeploy plan` asks too."""

from __future__ import annotations

#: Inputs of one scale, where they divide a row.
GROUP = 128


def fitting_group(inputs: int, group: int) -> int:
    """`group` where it divides the inputs, else the largest multiple of 16 below it that does, else all inputs; group 0: all inputs."""
    if not group or inputs <= group:
        return inputs
    return next((g for g in (group, *range(group - group % 16, 15, -16)) if inputs % g == 0), inputs)
