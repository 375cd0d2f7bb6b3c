"""Models to experiment on: a real language model and two small nets.

decoding       token after token: how the next one is chosen
llama          a Llama written for reading
reading        what a causal language model has read: our Llama, and those of transformers
shapes         shapes of well-known models, for questions that need no weights
digits         two small nets for experiments that take seconds
quantize       a frozen base in 4 bits: GGUF's blocks, NF4
configs        config.json: which model is a Llama of ours, and its shape
chat_template  conversations to text, by a program of the model's, with limits of time and memory
tokenizer      text to token ids and back, and conversations to text
gguf_header    a GGUF file's header, held against the file's size
gguf_reader    reads a GGUF file, with Hugging Face's names
gguf_writer    writes one, for llama.cpp and Ollama
download       SmolLM2-135M from a Python package, into a cache
huggingface    models of transformers, of any architecture
pretrained     loads pre-trained weights into our Llama or by transformers, and saves them to a folder or a GGUF file
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    [
        "chat_template",
        "configs",
        "decoding",
        "digits",
        "download",
        "gguf_header",
        "gguf_reader",
        "gguf_writer",
        "huggingface",
        "llama",
        "pretrained",
        "quantize",
        "reading",
        "shapes",
        "tokenizer",
    ],
)
