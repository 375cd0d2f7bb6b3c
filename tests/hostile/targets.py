"""All targets, and the share of each in the cases."""

from tests.hostile import adapters, data, folders, gguf, runs
from tests.hostile.workers import Target

TARGETS = {
    target.name: target
    for target in (
        Target.of(gguf, 0.25),
        Target.of(folders, 0.15),
        Target.of(adapters, 0.15),
        Target.of(data, 0.08),
        Target.of(runs, 0.12),
    )
}
