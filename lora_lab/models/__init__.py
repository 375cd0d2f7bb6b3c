"""Models to experiment on: a real language model and two small nets.

reading        what a causal language model has read, and token after token what follows
llama          a Llama written for reading
shapes         a model's shape: config.json, and those of well-known models for questions that need no weights
digits         two small nets for experiments that take seconds
quantize       a frozen base in 4 bits: GGUF's blocks, NF4
chat_template  conversations to text, by a program of the model's, with limits of time and memory
tokenizer      text to token ids and back, and conversations to text
gguf           reads a GGUF file, held against its size, and writes one for llama.cpp and Ollama
pretrained     loads pre-trained weights into our Llama or by transformers, and saves them to a folder or a GGUF file
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["chat_template", "digits", "gguf", "llama", "pretrained", "quantize", "reading", "shapes", "tokenizer"],
)
