"""What SECURITY.md says of links, held against what loading and saving do."""

from lora_lab import Llama, load_pretrained, save_model
from tests.helpers import ROOT

PAGE = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())


def test_links_are_followed_on_loading_and_replaced_on_saving_as_the_page_says(tmp_path, tiny_config, tiny_tokenizer):
    assert "**Links are followed.** A link in a folder is read like the file that it leads to, wherever that is" in PAGE
    assert "`find FOLDER -type l`" in PAGE
    assert "it replaces a link there and does not write through it" in PAGE
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
