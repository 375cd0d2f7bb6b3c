"""What a plain install must be able to do from any folder, without the checkout and without the model.

python .ci/smoke.py
"""

import tempfile
from importlib import resources
from pathlib import Path

import lora_lab as ll
from lora_lab import records, tasks
from lora_lab.course.copies import copy_lessons
from lora_lab.course.sheets import write_course
from lora_lab.models.digits import DigitsMLP

package = Path(ll.__file__).parent
assert package != Path(__file__).resolve().parent.parent / "lora_lab", "this is the checkout; install the package"
assert all(getattr(ll, name) is not None for name in ll.__all__)
assert (package / "py.typed").is_file()
assert records.load_all("memory"), "the records did not come along"
assert ll.claims.verdict("attention-256-mlp-128").result.date, "the claims did not come along"
assert ll.claims.verdict("more-training-higher-rank").result.date, "the lessons did not come along, or were not run"
assert (resources.files(tasks) / "data" / "style.jsonl").is_file()

with tempfile.TemporaryDirectory() as folder:
    assert "Written" in copy_lessons(folder)[0], "the lessons did not come along"
    assert "Written" in write_course(f"{folder}/graded")[0], "the hidden tests did not come along"

model, task = DigitsMLP(), tasks.digits("pretrain")
before = ll.evaluate(model, task)
ll.fit(model, task, ll.LoRA(rank=8), steps=100, lr=1e-2)
after = ll.evaluate(model, task)
assert after < before / 2, f"100 steps take the validation loss from {before:.2f} to {after:.2f} only"

twin = DigitsMLP()
with tempfile.TemporaryDirectory() as folder:
    ll.save_adapter(model, folder)
    ll.load_adapter(twin, folder)
assert ll.evaluate(twin, task) == after
print(f"lora_lab {ll.__version__} in {package}: loss {before:.2f} -> {after:.2f}, saved and loaded again")
