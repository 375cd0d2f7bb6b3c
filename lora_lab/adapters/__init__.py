"""What can I do with an adapter? Save and load it in PEFT's format, take it to llama.cpp, switch it, turn it off,
extract it, lower its rank, and combine several.

edit         switch, off, strength, extract, resize
peft_format  adapters as files, in the format of the PEFT library, with a model card; several adapters as one
export       a whole model with its adapter merged, as a Hugging Face folder; files for llama.cpp and Ollama
chat         a conversation whose adapter changes between answers, in a terminal or a notebook
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "edit": ["extract", "off", "resize", "strength", "switch"],
        "peft_format": ["CONFIG", "WEIGHTS", "combine", "load_adapter", "read_adapter", "save_adapter", "shipped"],
        "export": ["load_merged", "save_gguf", "save_merged"],
    },
)
