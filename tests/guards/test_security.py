"""Links in a stranger's folder are followed on loading, and replaced on saving."""

from lora_lab import Llama, load_pretrained, save_model


def test_links_are_followed_on_loading_and_replaced_on_saving(tmp_path, tiny_config, tiny_tokenizer):
    folder, mine = tmp_path / "stranger", tmp_path / "mine.txt"
    save_model(Llama(tiny_config, seed=1), folder, tiny_tokenizer)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    mine.write_text("a secret")
    (folder / "chat_template.jinja").symlink_to(mine)
    model, tokenizer = load_pretrained(folder, device="cpu")
    assert tokenizer.chat([]) == "a secret"
    save_model(model, tmp_path / "copy", tokenizer)
    assert "a secret" in (tmp_path / "copy" / "tokenizer_config.json").read_text(encoding="utf-8")
    outside = (tmp_path / "outside.safetensors").read_bytes()
    save_model(Llama(tiny_config, seed=2), folder, tokenizer)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert (mine.read_text(), (tmp_path / "outside.safetensors").read_bytes()) == ("a secret", outside)
