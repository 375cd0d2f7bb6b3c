"""What can I do with an adapter? Save and load it in PEFT's format; switch, take off, extract, resize it.

peft_format  adapters as states and as files, which the PEFT library reads and writes
edit         switch, off, extract, resize
"""

from lora_lab.adapters.edit import extract, off, resize, switch
from lora_lab.adapters.peft_format import CONFIG, WEIGHTS, load_adapter, read_adapter, read_config, save_adapter

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "extract",
    "load_adapter",
    "off",
    "read_adapter",
    "read_config",
    "resize",
    "save_adapter",
    "switch",
]
