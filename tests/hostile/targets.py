"""All targets, and the share of each in the cases."""

from tests.hostile import adapters, folders, gguf
from tests.hostile.workers import Target

TARGETS = {
    target.name: target
    for target in (
        Target.of(gguf, 0.25),
        Target.of(folders, 0.15),
        Target.of(adapters, 0.15),
    )
}
