"""Model folders that are not what is needed: the message says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import hf_configs
from vime.errors import BadInput
from vime.models.folder import check_names, check_quantisation, check_tokenizer, fitted, other_kind

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "weights in pytorch_model.bin: save them in the safetensors format"),
        ("model-00001-of-00002.safetensors", "has shards such as model-00001-of-00002.safetensors, but its index"),
        ("adapter_config.json", "holds an adapter"),
        ("consolidated.00.pth", "weights in consolidated.00.pth"),
        ("latest_checkpointed_iteration.txt", "is a torch_dist checkpoint: give it as --ref-load"),
        ("README.md", "give the folder of an HF checkpoint"),
    ],
)
def test_a_folder_without_an_index_is_named_for_what_it_is(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).touch()
    assert said in other_kind(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.weight", "a name of an adapter"),
        ("model.layers.0.mlp.experts.gate_up_proj", "all experts fused"),
    ],
)
def test_names_of_another_kind_of_checkpoint_are_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check_names(tmp_path, [EMBEDDING, name])


def test_bf16_weights_with_a_quantisation_left_over_are_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(BadInput, match="remove quantization_config"):
        check_quantisation(tmp_path, config, [EMBEDDING])
    check_quantisation(tmp_path, config, [EMBEDDING, "model.layers.0.mlp.up_proj.weight_scale_inv"])
    check_quantisation(tmp_path, {}, [EMBEDDING])


@pytest.mark.parametrize(("counted", "present", "said"), [(0, 1, "these are taken"), (1, 0, "without the others")])
def test_the_tensors_decide_how_many_layers_predict_further_tokens(counted: int, present: int, said: str) -> None:
    hf = {**hf_configs.DEEPSEEK_R1, "num_nextn_predict_layers": counted}
    names = [EMBEDDING, *(f"model.layers.{61 + number}.eh_proj.weight" for number in range(present))]
    found, (note,) = fitted(hf, names)
    assert found["num_nextn_predict_layers"] == present
    assert said in note
    assert fitted(found, names)[1] == []
    assert fitted(hf, ["unknown"]) == (hf, [])


def test_a_tokenizer_that_is_code_of_the_checkpoint_is_refused_or_trusted(tmp_path: Path) -> None:
    options = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(BadInput, match=r"needs code that comes with the checkpoint .*--trust-remote-code"):
        check_tokenizer(tmp_path, trust_remote_code=False)
    check_tokenizer(tmp_path, trust_remote_code=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_tokenizer(tmp_path, trust_remote_code=False)


def test_a_tokenizer_of_an_unknown_class_is_refused_or_trusted(tmp_path: Path) -> None:
    """transformers would put another tokenizer in its place, with other token ids."""
    (tmp_path / "vocab.json").write_text("{}")
    for name in ("Qwen2Tokenizer", "LlamaTokenizerFast"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        check_tokenizer(tmp_path, trust_remote_code=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TikTokenTokenizer"}))
    with pytest.raises(BadInput, match="tokenizer_class is TikTokenTokenizer, which transformers 5"):
        check_tokenizer(tmp_path, trust_remote_code=False)
    check_tokenizer(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("text", ["", "[]", '{"auto_map": [], "tokenizer_class": 3}', "\xff"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match=r"has no tokenizer \(none of tokenizer\.json"):
        check_tokenizer(tmp_path, trust_remote_code=False)
    check_tokenizer(tmp_path, trust_remote_code=True)
