"""Draw docs/first_look.png, the README's picture: python docs/first_look.py"""

from pathlib import Path

import lora_lab as ll
from lora_lab import plots

PROMPT = "Write a small story about a bucket with a hole."


def main() -> None:
    """Ask the base, the base with an adapter, and the base with the adapter off."""
    plots.use_style()
    model, tokenizer = ll.load_pretrained(device="cpu")

    def ask(most: int) -> str:
        sampling = {"temperature": 0.5, "repetition_penalty": 1.1, "seed": 3}
        return ll.reply(model, tokenizer, PROMPT, max_new_tokens=most, **sampling)

    base = ask(50)
    ll.load_adapter(model, ll.adapters.shipped("lighthouse-keeper"))
    texts = {"base": f"{base} ...", "with the adapter": ask(130)}
    with ll.adapters.off(model):
        texts["adapter off"] = f"{ask(50)} ..."
    assert texts["adapter off"] == texts["base"]
    plots.save(plots.answers(PROMPT, texts, columns=72), Path(__file__).with_name("first_look.png"))


if __name__ == "__main__":
    main()
