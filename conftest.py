"""What holds for unit tests and for the kernels that nbval starts: they inherit this environment."""

import os

os.environ["LORA_LAB_DEVICE"] = os.environ.get("LORA_LAB_DEVICE", "cpu")
os.environ["LORA_LAB_EFFORT"] = os.environ.get("LORA_LAB_EFFORT", "quick")
os.environ["LORA_LAB_PROGRESS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# A thread that waits gives its core back: without this, a second process on the machine makes
# every small matrix product several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
