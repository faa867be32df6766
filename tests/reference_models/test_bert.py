"""BERT: the same numbers as transformers from the same files, counts, gradients, and what happens to bad files."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from minilora import LoRAConfig, count_parameters, inject_lora
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.names import strip_wrappers
from tests.support.parity import BOUNDS, assert_parity, distance
from tests.support.text_parity import (
    adapted_pairs,
    check_lora_gradients,
    key_biases_agree,
    randomize,
    surviving_mutants,
    write_checkpoint,
)

SIZES = [
    dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    dict(
        vocab_size=71,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=19,
        hidden_act="gelu_new",
        layer_norm_eps=1e-3,
        type_vocab_size=3,
    ),
]


def oracle(kind=transformers.BertModel, size: int = 0, **changes):
    options = {"attn_implementation": "eager", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return randomize(kind(transformers.BertConfig(**options | SIZES[size] | changes)), seed=size)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 70, (3, 11), generator=generator)
    mask = (torch.arange(11) < torch.tensor([11, 7, 4])[:, None]).long()
    segments = (torch.arange(11) >= torch.tensor([5, 3, 9])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


@pytest.mark.parametrize("size", [0, 1])
def test_equals_transformers_from_its_saved_directory(size, batch, tmp_path):
    theirs = oracle(size=size)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        assert_parity(ours, theirs, ask=lambda model, words=inputs: model(**words)[:2])


def test_reads_the_first_hub_files_with_gamma_beta_prefix_and_heads(batch, tmp_path):
    theirs = oracle(transformers.BertForPreTraining)
    rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for key, tensor in theirs.state_dict().items():
        for new, old in rename.items():
            key = key.replace(new, old)
        state[key] = tensor
    state["bert.embeddings.position_ids"] = torch.arange(5)[None]
    ours = load_pretrained(write_checkpoint(tmp_path, state, theirs.config.to_dict())).eval()
    assert_parity(ours, theirs.bert, ask=lambda model: model(**batch)[:1])


def test_a_file_without_pooler_gives_a_model_without_one(batch, tmp_path):
    theirs = oracle(transformers.BertForMaskedLM)
    ours = load_pretrained(write_checkpoint(tmp_path, theirs.state_dict(), theirs.config.to_dict())).eval()
    assert ours(**batch)[1] is None
    assert_parity(ours, ours, ask=lambda m: m.pooled(**batch), ask_theirs=lambda m: m(**batch)[0][:, 0])


def test_every_swap_in_the_key_table_breaks_parity(batch, tmp_path):
    theirs = oracle()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(**batch)
    expected = torch.cat([expected.last_hidden_state.flatten(), expected.pooler_output.flatten()])

    def run(model):
        tokens, pooled = model(**batch)
        return torch.cat([tokens.flatten(), pooled.flatten()])

    state = strip_wrappers(load_file(tmp_path / "model.safetensors"))
    assert key_biases_agree(ours, state, "transformers4")
    survivors = surviving_mutants(ours, state, ours.key_table("transformers4"), run, expected)
    # a bias on the keys adds the same to all scores of a query: softmax does not see it
    assert [pair for pair in survivors if pair.count("attention.self.key.bias") < 2] == []


@pytest.mark.parametrize("pooler", [True, False])
def test_pooled_last_block_changes_neither_value_nor_gradient(pooler, batch):
    model = create_model("bert-nano", depth=2, dim=32, hidden=64, pooler=pooler).double()
    results = []
    for switch in (True, False):
        model.pooled_last_block = switch
        model.zero_grad()
        pooled = model.pooled(**batch)
        pooled.sin().sum().backward()
        results.append((pooled, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (one, grads_one), (all_, grads_all) = results
    assert distance(one, all_) <= BOUNDS[torch.float64]
    assert_close(grads_one, grads_all, rtol=0, atol=1e-12)


def test_lora_gradients_equal_pefts(batch):
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    theirs = oracle()
    ours = create_model("bert-nano", vocab_size=90, dim=32, depth=2, heads=4, hidden=48, max_positions=512)
    table = ours.key_table("transformers5")
    state = {entry.ours[0]: theirs.state_dict()[entry.theirs] for entry in table}
    ours.load_state_dict(state)
    wrapped = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    inject_lora(ours, LoRAConfig(r=3, lora_alpha=6, target_modules=names))
    pairs = adapted_pairs(ours, "transformers5", "base_model.model.")

    def loss(model):
        out = model(**batch)
        tokens = out[0] if isinstance(out, tuple) else out.last_hidden_state
        pooled = out[1] if isinstance(out, tuple) else out.pooler_output
        return tokens.sin().sum() + pooled.sin().sum()

    check_lora_gradients(ours, wrapped, pairs, loss)


@pytest.mark.parametrize("layout", ["minilora", "transformers4", "transformers5"])
def test_round_trip_is_bit_equal_and_loads_in_transformers(layout, batch, tmp_path):
    model = randomize(create_model("bert-nano", vocab_size=90, dim=32, depth=2, hidden=64))
    save_pretrained(model, tmp_path / "a", layout)
    again = load_pretrained(tmp_path / "a")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert again.config.eps == model.config.eps and again.config.heads == model.config.heads
    if layout != "minilora":
        theirs, report = transformers.BertModel.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        theirs.save_pretrained(tmp_path / "b")
        back = load_pretrained(tmp_path / "b")
        assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())
        assert_parity(model, theirs.eval(), ask=lambda model: model(**batch)[:1])


def test_parameter_counts_equal_the_listed_ones(shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        assert count_parameters(create_model("bert-base")).total == counts["bert_base_with_pooler"]
        model = create_model("bert-base", pooler=False)
        assert count_parameters(model).total == counts["bert_base_no_pooler"]
        assert count_parameters(model.blocks[0]).total == counts["bert_base_layer"]
        assert count_parameters(model.embeddings).total == counts["bert_base_embeddings"]
        lora = inject_lora(create_model("bert-base"), LoRAConfig(r=64))
        assert count_parameters(lora) == (counts["lora_r64_qv_base_each"], counts["bert_lora_r64_total"])


def test_key_table_covers_the_listed_checkpoint(shared):
    with torch.device("meta"):
        model = create_model("bert-base")
    for file in ("hf_bert_base_uncased__BertModel", "hf_bert_base_uncased__BertForPreTraining"):
        lines = (shared / "keys" / f"{file}.txt").read_text().splitlines()
        keys = {line.split("\t")[0].removeprefix("bert.") for line in lines if not line.startswith("#")}
        table = {entry.theirs for entry in model.key_table("transformers4")}
        assert table == {key for key in keys if not key.startswith("cls.")}


def test_bert_nano_is_small_enough_to_be_bundled():
    assert 2 * count_parameters(create_model("bert-nano")).total <= 4e6


def test_bad_checkpoints_and_too_long_texts_are_named(tmp_path, batch):
    theirs = oracle()
    good, config = theirs.state_dict(), theirs.config.to_dict()
    cases = {
        "vocabulary": (good, {**config, "vocab_size": 80}, "embeddings.word.weight is (90, 32)"),
        "layers": (good, {**config, "num_hidden_layers": 3}, "blocks.2.attn.q_proj.weight"),
        "extra": ({**good, "odd.weight": torch.zeros(2)}, config, "odd.weight"),
        "nan": ({**good, "pooler.dense.bias": torch.full((32,), torch.nan)}, config, "pooler.dense.bias"),
        "positions": (good, {**config, "position_embedding_type": "relative_key"}, "relative_key"),
        "heads": (good, {**config, "num_attention_heads": 5}, "width 32"),
        "activation": (good, {**config, "hidden_act": "swoosh"}, "swoosh"),
    }
    for name, (state, settings, message) in cases.items():
        with pytest.raises(ModelError) as error:
            load_pretrained(write_checkpoint(tmp_path / name, state, settings))
        assert message in str(error.value), name
    with pytest.raises(ModelError, match="num_classes"):
        create_model("bert-nano", num_classes=3)
    with pytest.raises(ValueError, match="129 tokens"):
        create_model("bert-nano").pooled(torch.zeros(1, 129, dtype=torch.long))
