"""What can I do with an adapter? Save and load it in PEFT's format, take it to llama.cpp, switch it, turn it off,
extract it, lower its rank, and combine several.

edit         switch, off, strength, extract, resize
peft_format  adapters as files, in the format of the PEFT library, with a model card; several adapters as one
export       a whole model with its adapter merged, as a Hugging Face folder; files for llama.cpp and Ollama
chat         a conversation whose adapter changes between answers, in a terminal or a notebook
"""

from lora_lab.adapters.edit import off, resize, strength, switch
from lora_lab.adapters.export import save_gguf, save_merged
from lora_lab.adapters.peft_format import CONFIG, WEIGHTS, combine, read_adapter, shipped

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "combine",
    "off",
    "read_adapter",
    "resize",
    "save_gguf",
    "save_merged",
    "shipped",
    "strength",
    "switch",
]
