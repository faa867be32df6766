"""Which vector a text has: four poolings, and the folder that says which one a sentence encoder was trained for."""

import json

import pytest
import torch

from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.load import bundled_weights
from reference_models.text.tokenizers import load_tokenizer

IDS = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 5, 3, 0, 0, 0], [2, 5, 6, 7, 8, 3]])
MASK = (IDS > 0).long()
TINY = {"dim": 24, "depth": 2, "heads": 2, "hidden": 40, "vocab_size": 50}


def tiny(**settings):
    torch.manual_seed(0)
    return create_model("bert-nano", **TINY, **settings).double().eval()


def by_hand(model, pooling):
    """Each text by itself, without padding."""
    tokens = [model.forward_features(ids[ids > 0][None])[0] for ids in IDS]
    kinds = {"mean": lambda x: sum(x) / len(x), "max": lambda x: x.max(0).values, "cls": lambda x: x[0]}
    return torch.stack([kinds[pooling](x) for x in tokens])


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_padding_has_no_part_in_a_texts_vector(pooling):
    model = tiny(pooling=pooling)
    assert model.pooler is None, "what is not read is not there to be trained"
    wanted = by_hand(model, pooling)
    torch.testing.assert_close(model.pooled(IDS, MASK), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(IDS, MASK)[1], wanted, rtol=1e-9, atol=1e-9)
    parameters = list(model.blocks.parameters())
    ours = torch.autograd.grad(model.pooled(IDS, MASK).sin().sum(), parameters)
    theirs = torch.autograd.grad(wanted.sin().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_pooler_is_what_it_was():
    model = tiny()
    first = model.forward_features(IDS, MASK)[:, 0]
    torch.testing.assert_close(model.pooled(IDS, MASK), torch.tanh(model.pooler.dense(first)), rtol=1e-9, atol=1e-9)


def test_a_model_without_mask_takes_every_token():
    model = tiny(pooling="mean")
    torch.testing.assert_close(model.pooled(IDS), model.forward_features(IDS).mean(1), rtol=1e-9, atol=1e-9)


def folder_with(tmp_path, told):
    folder = save_pretrained(tiny().float(), tmp_path / "encoder", "transformers")
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text(json.dumps(told))
    return folder


def modes(**on):
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 24} | {f"pooling_mode_{name}": name in on for name in names}


TOLD = [
    (modes(mean_tokens=True), "mean"),
    (modes(cls_token=True) | {"include_prompt": True}, "cls"),
    (modes(max_tokens=True), "max"),
    ({"embedding_dimension": 24, "pooling_mode": "mean", "include_prompt": True}, "mean"),
    ({"embedding_dimension": 24, "pooling_mode": ["cls"]}, "cls"),
]


@pytest.mark.parametrize("told, pooling", TOLD)
def test_a_folder_says_its_pooling_and_a_setting_wins(tmp_path, told, pooling):
    folder = folder_with(tmp_path, told)
    model = load_pretrained(folder).double().eval()
    assert model.config.pooling == pooling
    torch.testing.assert_close(model.pooled(IDS, MASK), by_hand(model, pooling), rtol=1e-9, atol=1e-9)
    assert load_pretrained(folder, pooling="pooler").pooler is not None
    assert load_pretrained("bert-nano", folder / "model.safetensors", **TINY).config.pooling == pooling
    again = load_pretrained(save_pretrained(model.float(), tmp_path / "ours"))
    assert again.config.pooling == pooling, "our own files keep it"


@pytest.mark.parametrize("told", [modes(lasttoken=True), modes(mean_tokens=True, cls_token=True), modes(), {}])
def test_a_pooling_that_is_not_known_is_named_and_can_be_chosen(tmp_path, told):
    folder = folder_with(tmp_path, told)
    with pytest.raises(
        ModelError, match=r"1_Pooling.config\.json: pooling .* is not supported; choose mean, cls or max"
    ):
        load_pretrained(folder)
    assert load_pretrained(folder, pooling="mean").config.pooling == "mean"


def steps(*names, start="sentence_transformers.models."):
    return [{"idx": i, "name": str(i), "path": f"{i}_{name}", "type": start + name} for i, name in enumerate(names)]


@pytest.mark.parametrize(
    "start", ["sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."]
)
def test_a_folder_that_normalizes_gives_vectors_of_length_one_also_where_the_pooling_is_chosen(tmp_path, start):
    folder = folder_with(tmp_path, modes(mean_tokens=True))
    told = steps("Transformer", "Pooling", "Normalize", start=start)
    (folder / "modules.json").write_text(json.dumps(told))
    for chosen in ({}, {"pooling": "mean"}):
        model = load_pretrained(folder, **chosen).double().eval()
        wanted = by_hand(model, "mean")
        wanted = wanted / wanted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.pooled(IDS, MASK), wanted, rtol=1e-9, atol=1e-9)
    assert not load_pretrained(folder, pooling="pooler").config.normalize, "the pooler is none of its steps"
    (folder / "modules.json").write_text(json.dumps(told[:2]))
    assert not load_pretrained(folder).config.normalize


def test_a_layer_behind_the_pooling_is_named_and_can_be_left_out(tmp_path):
    folder = folder_with(tmp_path, modes(mean_tokens=True))
    (folder / "modules.json").write_text(json.dumps(steps("Transformer", "Pooling", "Dense", "Normalize")))
    with pytest.raises(ModelError, match=r"modules\.json: the step Dense is not supported; choose mean, cls or max"):
        load_pretrained(folder)
    assert load_pretrained(folder, pooling="cls").config.normalize


@pytest.mark.parametrize("told, longest", [({"max_seq_length": 9}, 9), ({"max_seq_length": 4000}, 100), ({}, 100)])
def test_the_longest_text_is_that_of_sentence_bert_config(tmp_path, told, longest):
    load_tokenizer(bundled_weights("bert-nano")).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 100}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(told | {"do_lower_case": False}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.max_length == longest
    assert tokenizer(["what is it? " * 100])["input_ids"].shape == (1, longest)
    tokenizer.save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").max_length == longest


def test_lower_casing_that_the_vocabulary_does_not_do_is_named(tmp_path):
    load_tokenizer(bundled_weights("bert-nano")).save(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert load_tokenizer(tmp_path).lowercase, "this one does"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    with pytest.raises(ModelError, match=r"sentence_bert_config\.json, key do_lower_case"):
        load_tokenizer(tmp_path)


def test_texts_of_open_clip_without_an_end_token_are_named(tmp_path):
    load_tokenizer(bundled_weights("bert-nano")).save(tmp_path)
    kwargs = {"text_cfg": {"tokenizer_kwargs": {"strip_sep_token": True}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": kwargs}))
    with pytest.raises(ModelError, match=r"open_clip_config\.json, key strip_sep_token: .*CLIPA"):
        load_tokenizer(tmp_path)


def test_an_unknown_pooling_names_the_choices():
    with pytest.raises(ModelError, match="the choices are pooler, mean, cls, max"):
        tiny(pooling="median")


def test_minilm_gives_the_mean_of_its_tokens_under_the_mask(shared):
    model = load_pretrained(shared / "weights" / "minilm-l6", pooling="mean").eval()
    ids = torch.tensor([[101, 2054, 2003, 2006, 1996, 2795, 102], [101, 2054, 3609, 102, 0, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        hidden, vector = model(ids, mask)
    wanted = torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)])
    torch.testing.assert_close(vector, wanted, rtol=1e-6, atol=1e-6)
