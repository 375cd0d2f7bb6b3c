"""What can I do with an adapter? Save and load it in PEFT's format, take it to llama.cpp, switch it, turn it off,
extract it, lower its rank, and combine several.

edit         switch, off, strength, extract, resize
peft_format  adapters as files, in the format of the PEFT library, with a model card; several adapters as one
export       a whole model with its adapter merged, as a Hugging Face folder; files for llama.cpp and Ollama
chat         a conversation whose adapter changes between answers, in a terminal or a notebook
"""

from lora_lab.adapters.edit import extract as extract
from lora_lab.adapters.edit import off as off
from lora_lab.adapters.edit import resize as resize
from lora_lab.adapters.edit import strength as strength
from lora_lab.adapters.edit import switch as switch
from lora_lab.adapters.export import load_merged as load_merged
from lora_lab.adapters.export import save_gguf as save_gguf
from lora_lab.adapters.export import save_merged as save_merged
from lora_lab.adapters.peft_format import CONFIG as CONFIG
from lora_lab.adapters.peft_format import WEIGHTS as WEIGHTS
from lora_lab.adapters.peft_format import combine as combine
from lora_lab.adapters.peft_format import load_adapter as load_adapter
from lora_lab.adapters.peft_format import read_adapter as read_adapter
from lora_lab.adapters.peft_format import save_adapter as save_adapter
from lora_lab.adapters.peft_format import shipped as shipped
