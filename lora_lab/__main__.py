"""``python -m lora_lab``: the command ``lora-lab``, for torchrun."""

import sys

from lora_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
