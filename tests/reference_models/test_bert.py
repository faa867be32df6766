"""BERT, RoBERTa, XLM-RoBERTa, DistilBERT and MPNet: the same numbers as transformers from the same files, counts,
gradients, and what happens to bad files.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from minilora import LoRAConfig, count_parameters, export_adapter, inject_lora, load_adapter, merge_lora
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.names import strip_wrappers
from tests.support.parity import BOUNDS, assert_keys_of, assert_parity, distance
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


FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
FAMILIES["mpnet"] = "MPNet"
PAD = {"bert": 0, "distilbert": 0}  # of the others 1
DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
DISTILBERT |= {"intermediate_size": "hidden_dim", "hidden_act": "activation"}


def oracle(kind: str = "Model", size: int = 0, family: str = "bert", **changes):
    """transformers' model of a family, such as oracle("ForMaskedLM", family="roberta")."""
    options = {"attn_implementation": "eager", **SIZES[size], **changes}
    if family == "distilbert":
        options = {DISTILBERT.get(key, key): value for key, value in options.items()}
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**options)
    return randomize(getattr(transformers, FAMILIES[family] + kind)(config), seed=size)


def words(family: str = "bert") -> dict[str, torch.Tensor]:
    """Three texts of 11, 7 and 4 tokens; segments where the family has some."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 70, (3, 11), generator=generator)
    mask = (torch.arange(11) < torch.tensor([11, 7, 4])[:, None]).long()
    segments = (torch.arange(11) >= torch.tensor([5, 3, 9])[:, None]).long()
    batch = {"input_ids": ids.where(mask.bool(), PAD.get(family, 1)), "attention_mask": mask}
    return batch | ({} if family in ("distilbert", "mpnet") else {"token_type_ids": segments})


def answers(model, batch):
    """The tokens, and the pooler's vector where there is one."""
    found = model(**batch)
    return tuple(one for one in (found if isinstance(found, tuple) else found.to_tuple()) if one is not None)


@pytest.fixture(scope="module")
def batch():
    return words()


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_from_its_saved_directory(family, size, tmp_path):
    theirs, batch = oracle(size=size, family=family), words(family)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    unpadded = {"input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 7)}
    # padding that no mask hides: RoBERTa and MPNet do not count it
    for inputs in (batch, unpadded, {"input_ids": batch["input_ids"]}):
        assert_parity(ours, theirs, ask=lambda model, inputs=inputs: answers(model, inputs))


HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fine_tuned_model_is_read_without_its_head(family, kind, tmp_path):
    theirs, batch = oracle(kind, family=family), words(family)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert_parity(ours, theirs.base_model, ask=lambda model: answers(model, inputs)[:1])


def test_far_keys_share_mpnets_buckets(tmp_path):
    theirs = oracle(family="mpnet", max_position_embeddings=402)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(2, 70, (1, 400), generator=torch.Generator().manual_seed(1))
    assert_parity(
        load_pretrained(tmp_path).eval(), theirs, ids, ask=lambda model, ids: answers(model, {"input_ids": ids})
    )


def test_reads_the_first_hub_files_with_gamma_beta_prefix_and_heads(batch, tmp_path):
    theirs = oracle("ForPreTraining")
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
    theirs = oracle("ForMaskedLM")
    ours = load_pretrained(write_checkpoint(tmp_path, theirs.state_dict(), theirs.config.to_dict())).eval()
    assert ours(**batch)[1] is None
    assert_parity(ours, ours, ask=lambda m: m.pooled(**batch), ask_theirs=lambda m: m(**batch)[0][:, 0])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
def test_every_swap_in_the_key_table_breaks_parity(family, tmp_path):
    theirs, batch = oracle(family=family), words(family)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()

    def run(model):
        return torch.cat([one.flatten() for one in answers(model, batch)])

    with torch.no_grad():
        expected = run(theirs)
    state = strip_wrappers(load_file(tmp_path / "model.safetensors"))
    assert key_biases_agree(ours, state, "transformers4")
    survivors = surviving_mutants(ours, state, ours.key_table("transformers4"), run, expected)
    # a bias on the keys adds the same to all scores of a query: softmax does not see it
    keys = {entry.theirs for entry in ours.key_table("transformers4") if entry.ours[0].endswith("k_proj.bias")}
    assert [pair for pair in survivors if not {*pair.split(" <-> ")} <= keys] == []


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("name", ["bert-nano", "roberta-base", "mpnet-base"])
def test_pooled_last_block_changes_neither_value_nor_gradient(name, pooler):
    sizes = {"depth": 2, "dim": 32, "heads": 4, "hidden": 64, "vocab_size": 90}
    model = create_model(name, **sizes, type_vocab=2, pooler=pooler).double()
    batch = words("bert" if name == "bert-nano" else "roberta")
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


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
def test_lora_gradients_equal_pefts(family, tmp_path):
    theirs, batch = oracle(family=family), words(family)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    pairs = adapted_pairs(ours, "transformers5", "base_model.model.")
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    targets = [theirs.removeprefix("base_model.model.") for name, theirs in pairs.items() if name.endswith(names)]
    wrapped = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    inject_lora(ours, LoRAConfig(r=3, lora_alpha=6, target_modules=names))

    def loss(model):
        return sum(one.sin().sum() for one in answers(model, batch))

    check_lora_gradients(ours, wrapped, pairs, loss)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet"])
def test_adapters_travel_to_peft_and_back(family, tmp_path):
    theirs, batch = oracle(family=family), words(family)
    theirs.save_pretrained(tmp_path / "base")
    ours, again = load_pretrained(tmp_path / "base"), load_pretrained(tmp_path / "base")
    inject_lora(ours, LoRAConfig(r=3, lora_alpha=6, target_modules=("q_proj", "fc2"), init_lora_weights=False))
    wrapped = PeftModel.from_pretrained(theirs, export_adapter(ours, tmp_path / "adapter", "transformers5")).eval()
    assert_parity(ours.eval(), wrapped, ask=lambda model: answers(model, batch))
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    load_adapter(again, tmp_path / "theirs")
    assert_parity(again.eval(), ours, ask=lambda model: answers(model, batch))
    # merged, it is a model of transformers
    merged = merge_lora(again)
    whole = type(theirs).from_pretrained(save_pretrained(merged, tmp_path / "merged", "transformers"))
    assert_parity(whole.eval(), merged.eval(), ask=lambda model: answers(model, batch))


NAMES = {"bert": "bert-nano", "roberta": "roberta-base", "xlm-roberta": "xlm-roberta-base"}
NAMES |= {"distilbert": "distilbert-base", "mpnet": "mpnet-base"}


@pytest.mark.parametrize("layout", ["minilora", "transformers4", "transformers5"])
@pytest.mark.parametrize("family", NAMES)
def test_round_trip_is_bit_equal_and_loads_in_transformers(family, layout, tmp_path):
    batch = words(family)
    batch.pop("token_type_ids", None)
    model = randomize(create_model(NAMES[family], vocab_size=90, dim=32, heads=4, depth=2, hidden=64))
    save_pretrained(model, tmp_path / "a", layout)
    again = load_pretrained(tmp_path / "a")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert replace(again.config, name="") == replace(model.config, name="")
    if layout != "minilora":
        kind = getattr(transformers, f"{FAMILIES[family]}Model")
        theirs, report = kind.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        theirs.save_pretrained(tmp_path / "b")
        back = load_pretrained(tmp_path / "b")
        assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())
        assert_parity(model, theirs.eval(), ask=lambda model: answers(model, batch)[:1])


def test_names_have_the_sizes_of_the_published_files(shared):
    assert_keys_of("distilbert-base", "hf_distilbert_base__DistilBertModel", shared)
    with torch.device("meta"):
        published = {"roberta-base": 124_645_632, "xlm-roberta-base": 278_043_648, "mpnet-base": 109_486_464}
        assert {name: count_parameters(create_model(name)).total for name in published} == published


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
        "decoder": (good, {**config, "is_decoder": True}, "is_decoder"),
    }
    for name, (state, settings, message) in cases.items():
        with pytest.raises(ModelError) as error:
            load_pretrained(write_checkpoint(tmp_path / name, state, settings))
        assert message in str(error.value), name
    with pytest.raises(ModelError, match="num_classes"):
        create_model("bert-nano", num_classes=3)
    with pytest.raises(ValueError, match="129 tokens"):
        create_model("bert-nano").pooled(torch.zeros(1, 129, dtype=torch.long))


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet"])
def test_options_that_make_another_model_are_named(family, tmp_path):
    theirs = oracle(family=family)
    cases = {"is_decoder": True, "add_cross_attention": True, "position_embedding_type": "relative_key"}
    cases |= {"activation" if family == "distilbert" else "hidden_act": "swoosh", "relative_attention_num_buckets": 16}
    for key, value in cases.items():
        settings = {**theirs.config.to_dict(), key: value}
        with pytest.raises(ModelError, match=key if "act" not in key[-10:] else "swoosh"):
            load_pretrained(write_checkpoint(tmp_path / key, theirs.state_dict(), settings))


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("modernbert", "roberta-base"),
        ("electra", "bert-base"),
        ("albert", "distilbert-base"),
        ("deberta-v2", "roberta-base"),
        ("t5", "roberta-base"),
        ("mt5", "xlm-roberta-base"),
        ("m2m_100", "xlm-roberta-base"),
        ("xlm-roberta-xl", "roberta-base"),
        ("siglip2", "siglip2-base-patch16-224"),
    ],
)
def test_a_refused_model_names_in_one_line_what_to_take(kind, instead, tmp_path):
    folder = write_checkpoint(tmp_path, oracle().state_dict(), {"model_type": kind, "hidden_size": 32})
    with pytest.raises(ModelError, match=rf"{kind}: it has .*; take .*{instead}") as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=rf"{kind}-base.*: it has .*; take .*{instead}"):
        create_model(f"{kind}-base" if kind != "siglip2" else "siglip2-base-patch16-naflex")


def test_a_checkpoint_of_another_kind_than_its_name_is_refused(tmp_path):
    oracle(family="mpnet").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="family mpnet, but roberta-base was asked for"):
        load_pretrained("roberta-base", tmp_path)
