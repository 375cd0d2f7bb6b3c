"""All targets, and the share of each in the cases."""

from tests.hostile import adapters, api, commands, data, folders, gguf, interrupted, runs, security
from tests.hostile.workers import Target

TARGETS = {
    target.name: target
    for target in (
        Target.of(gguf, 0.25),
        Target.of(folders, 0.15),
        Target.of(adapters, 0.15),
        Target.of(data, 0.08),
        Target.of(runs, 0.12),
        Target.of(api, 0.17),
        Target.of(commands, 0.03),
        Target.of(interrupted, 0.04),
        Target.of(security, 0.03),
    )
}
