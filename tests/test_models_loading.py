"""Loading by name or folder, and the tiny models that the other tests use."""

from __future__ import annotations

import pytest
import torch
from pico import KINDS, pico, pico_tokenizer, save_pico

from sphere_plugin.errors import CacheError, ModelError
from sphere_plugin.models import load_model, loading, resolve_model


class TestResolve:
    def test_embedded_name(self, monkeypatch, tmp_path):
        monkeypatch.setattr(loading, "embedded_model", lambda: tmp_path / "folder")
        assert resolve_model("smollm2-135m") == str(tmp_path / "folder")

    @pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "./here", "/a/smollm2-135m", "SmolLM2-135M", "gpt2"])
    def test_anything_else_is_passed_on(self, name):
        assert resolve_model(name) == name


class TestLoad:
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_pico(self, kind, tmp_path):
        folder = save_pico(kind, tmp_path / "any name at all")
        model, tokenizer = load_model(str(folder))
        original, original_tokenizer = pico(kind)
        assert not model.training
        text = "The mother tongue of Leo Tolstoy is Russian, isn't it? 7 é"
        assert tokenizer(text)["input_ids"] == original_tokenizer(text)["input_ids"]
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, original(**inputs).logits)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype(self, dtype, tmp_path):
        model, _ = load_model(str(save_pico("llama", tmp_path)), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    def test_home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        save_pico("gpt2", tmp_path / "model")
        load_model("~/model")

    def test_pad_token_is_set(self, tmp_path):
        model, tokenizer = pico("gpt2")
        tokenizer.pad_token = None
        model.generation_config.pad_token_id = model.config.pad_token_id = None
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model, tokenizer = load_model(str(tmp_path))
        assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
        assert model.generation_config.pad_token_id == tokenizer.eos_token_id

    def test_no_token_to_pad_with(self, tmp_path):
        model, tokenizer = pico("gpt2")
        tokenizer.pad_token = tokenizer.eos_token = None
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="pad token.*tokenizer_config.json"):
            load_model(str(tmp_path))


class TestErrors:
    @pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "~/none/at/all", "a/b/c", ""])
    def test_no_such_folder(self, name):
        with pytest.raises(ModelError, match="expected an existing folder.*local folder.*smollm2-135m") as caught:
            load_model(name)
        assert caught.value.got == name

    def test_hub_out_of_reach(self, monkeypatch):
        from transformers import AutoModelForCausalLM

        def refuse(*args, **kwargs):
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nMore lines.")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        with pytest.raises(ModelError, match=r"'some/model'.*couldn't connect.*files\.\).*local folder") as caught:
            load_model("some/model")
        assert "More lines" not in str(caught.value)

    def test_folder_without_a_model(self, tmp_path):
        with pytest.raises(ModelError, match="a causal language model that loads"):
            load_model(str(tmp_path))

    def test_folder_without_a_tokenizer(self, tmp_path):
        pico("llama")[0].save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="a causal language model that loads"):
            load_model(str(tmp_path))

    def test_truncated_weights(self, tmp_path):
        weights = save_pico("llama", tmp_path) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ModelError, match="a causal language model that loads"):
            load_model(str(tmp_path))

    def test_the_cache_cannot_be_written(self, monkeypatch):
        def refuse():
            raise CacheError("cache", "full", "space", "Free some.")

        monkeypatch.setattr(loading, "embedded_model", refuse)
        with pytest.raises(CacheError, match="Free some"):
            load_model("smollm2-135m")


class TestPico:
    @pytest.mark.parametrize("kind", KINDS)
    def test_same_seed_same_model(self, kind):
        before = torch.random.get_rng_state()
        first, second, other = pico(kind)[0], pico(kind)[0], pico(kind, seed=1)[0]
        assert torch.equal(torch.random.get_rng_state(), before)
        pairs = list(zip(first.parameters(), second.parameters(), strict=True))
        assert all(torch.equal(one, two) and one is not two for one, two in pairs)
        assert not torch.equal(next(first.parameters()), next(other.parameters()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_outputs_depend_on_every_token(self, kind):
        model, tokenizer = pico(kind)
        inputs = tokenizer("The Eiffel Tower is in Paris", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(inputs).logits[0, -1]
            for place in range(inputs.shape[1]):
                changed = inputs.clone()
                changed[0, place] = 100
                assert (model(changed).logits[0, -1] - logits).abs().max() > 1e-2

    def test_bos_only_where_asked_for(self):
        for kind in KINDS:
            tokenizer = pico(kind)[1]
            ids = tokenizer("Paris")["input_ids"]
            assert (ids[0] == tokenizer.bos_token_id) == (kind == "llama")
            assert tokenizer("Paris", add_special_tokens=False)["input_ids"] == ids[kind == "llama" :]

    def test_tokenizer_keeps_any_text(self):
        tokenizer = pico_tokenizer()
        for text in (" two  spaces ", "é 東京 🙂\n\t", "x" * 300):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_tokenizers_are_independent(self):
        pico_tokenizer().add_tokens(["<new>"])
        assert len(pico_tokenizer()) == 384

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="expected one of"):
            pico("bert")
