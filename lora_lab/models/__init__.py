"""Models to experiment on: a real language model (llama, pretrained) and two small nets (digits)."""
