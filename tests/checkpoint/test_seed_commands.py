"""The conversion command of the document that vime started from, with the model arguments of such launch scripts."""

from __future__ import annotations

import shlex

from tests.support import hf_configs, tiny_hf
from tests.support.fake_checkpoint import write_checkpoint
from vime.checkpoint.convert import ignored_flags, main, read_arguments
from vime.recipe.load import load_with_notes

MODEL_ARGS = """
--disable-bias-linear --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
--kv-channels 64 --normalization RMSNorm --position-embedding-type rope --norm-epsilon 1e-6 --rotary-percent 1.0
--swiglu --untie-embeddings-and-output-weights --no-rope-fusion --vocab-size 129280 --multi-latent-attention
--q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm
--rotary-scaling-factor 40 --rotary-base 10000 --mscale 1.0 --mscale-all-dim 1.0 --attention-softmax-in-fp32
--num-experts 256 --moe-layer-freq ([0]*3+[1]*58) --moe-ffn-hidden-size 2048 --moe-router-topk 8
--moe-shared-expert-intermediate-size 2048 --moe-router-pre-softmax --moe-router-score-function sigmoid
--moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss --moe-token-dispatcher-type alltoall
--moe-aux-loss-coeff 0 --moe-router-bias-update-rate 0 --moe-router-group-topk 4 --moe-router-num-groups 8
--moe-grouped-gemm --moe-router-topk-scaling-factor 2.5 --moe-token-drop-policy probs --moe-router-dtype fp32
--moe-permute-fusion --no-masked-softmax-fusion
"""
CONVERSION = r"""
   --tensor-model-parallel-size 1 \
   --pipeline-model-parallel-size 8 \
   --expert-tensor-parallel-size 1 \
   --expert-model-parallel-size 4 \
   --decoder-first-pipeline-num-layers 7 \
   --decoder-last-pipeline-num-layers 6 \
   --hf-checkpoint $BASE_DIR/DeepSeek-R1-bf16/ \
   --save $BASE_DIR/DeepSeek-R1_torch_dist/
"""


def test_the_conversion_command_is_taken_as_written(tmp_path):
    hf = {name: value for name, value in hf_configs.DEEPSEEK_R1.items() if name != "quantization_config"}
    write_checkpoint(tmp_path / "DeepSeek-R1-bf16", hf)
    words = [*MODEL_ARGS.split(), *shlex.split(CONVERSION.replace("\\\n", " ").replace("$BASE_DIR", str(tmp_path)))]
    checkpoint, save, layout = read_arguments(words, world_size=32)
    assert (layout.pp, layout.ep, layout.first_stage_layers, layout.last_stage_layers) == (8, 4, 7, 6)
    assert (checkpoint.config.num_layers, save) == (61, tmp_path / "DeepSeek-R1_torch_dist")
    assert ignored_flags(words) == [
        "--attention-softmax-in-fp32", "--moe-token-dispatcher-type", "--moe-token-drop-policy",
        "--no-masked-softmax-fusion",
    ]  # fmt: skip


def test_a_conversion_says_which_flags_mean_nothing_to_it(tmp_path, capsys):
    hf = tiny_hf.write_checkpoint(tmp_path / "hf", tiny_hf.QWEN3)
    flags = ["--no-masked-softmax-fusion", "--attention-softmax-in-fp32", "--train-iters", "3"]
    assert main([*flags, "--hf-checkpoint", str(hf), "--save", str(tmp_path / "save")]) == 0
    said = "no meaning for the conversion: --no-masked-softmax-fusion, --attention-softmax-in-fp32, --train-iters"
    assert said in capsys.readouterr().out


def test_the_model_arguments_alone_are_taken_by_a_recipe():
    loaded = load_with_notes("deepseek-r1", MODEL_ARGS.split())
    assert loaded.recipe.model.model_args["num_layers"] == 61
    assert [note.split(":")[0] for note in loaded.notes] == [
        "without effect, since vime chooses how it is computed",
        "--moe-token-dispatcher-type alltoall is later than --moe-enable-deepep and wins",
    ]
