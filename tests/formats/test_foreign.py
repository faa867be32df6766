"""PEFT, transformers and timm: the same mathematics, the same files, in both directions."""

import copy
import json
import warnings

import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from minilora import LoRAConfig, export_adapter, inject_lora, load_adapter, save_adapter
from minilora.errors import UserError
from minilora.inject import lora_state_dict
from reference_models import create_model, load_pretrained, save_pretrained
from tests.support.helpers import randomise, randomise_trained, same_bits, tiny_vit
from tests.support.parity import assert_parity, fill

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
WEIGHTS = "adapter_model.safetensors"


def their_vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=16, num_labels=5)
    return randomise(transformers.ViTForImageClassification(config))


def their_bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, vocab_size=40, max_position_embeddings=16, num_labels=5)
    return randomise(transformers.BertForSequenceClassification(config))


ORACLES = {  # model, input, targets
    "ViT": (their_vit, lambda: torch.randn(3, 3, 32, 32), ["q_proj", "v_proj"]),
    "BERT": (their_bert, lambda: torch.randint(0, 40, (3, 9)), ["query", "value"]),
}
oracles = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank and alpha patterns": {"rank_pattern": {"0.*": 3}, "alpha_pattern": {"1.*": 5}},
    "bias of the adapted": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "head": {"modules_to_save": ["classifier"]},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_peft(model: nn.Module, targets, directory, **options) -> nn.Module:
    """`model` (changed in place) with an adapter of PEFT's full of random values, saved to `directory`."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, **options})
    model = randomise_trained(peft.get_peft_model(model, config)).eval()
    model.save_pretrained(directory)
    return model


# ---- the same mathematics as PEFT, on models of transformers


@oracles
@variants
def test_same_weights_and_adapters_give_pefts_logits_gradients_and_file(oracle, options, tmp_path):
    build, inputs, targets = oracle
    base, x = build(), inputs()
    theirs = by_peft(copy.deepcopy(base), targets, tmp_path / "theirs", **options)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_parity(ours, theirs, x)
    save_adapter(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()

    x = x.double() if x.is_floating_point() else x
    for model in (ours.double(), theirs.double()):
        model(x).logits.square().sum().backward()
    own = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    their_grads = {plain_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == their_grads.keys()
    largest = max(gradient.norm() for gradient in their_grads.values())
    for name, gradient in own.items():
        # a key bias shifts all scores of a query alike: its gradient is zero up to rounding
        assert (gradient - their_grads[name]).norm() <= 1e-9 * their_grads[name].norm() + 1e-12 * largest, name


def plain_name(name: str) -> str:
    """PEFT's parameter name inside the model -> ours."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default", "")


@oracles
@variants
def test_peft_loads_what_save_adapter_wrote(oracle, options, tmp_path):
    build, inputs, targets = oracle
    base, x = build(), inputs()
    config = LoRAConfig(r=2, lora_alpha=6, target_modules=tuple(targets), **options)
    ours = randomise_trained(inject_lora(copy.deepcopy(base), config))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_parity(ours, theirs, x)


@pytest.mark.parametrize(
    "options", [{"exclude_modules": ["layer.0.attention.self.query"]}, {"layers_to_transform": [1]}]
)
def test_pefts_choices_of_layers_are_followed(options, tmp_path):
    base, x = their_bert(), torch.randint(0, 40, (2, 5))
    theirs = by_peft(copy.deepcopy(base), ["query", "value"], tmp_path, **options)
    assert_parity(load_adapter(base, tmp_path), theirs, x)


def test_an_adapter_with_a_task_type_names_heads_that_the_model_does_not_have_and_loads(tmp_path):
    base, x = their_bert(), torch.randint(0, 40, (2, 5))
    theirs = by_peft(copy.deepcopy(base), ["query"], tmp_path, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    assert_parity(load_adapter(base, tmp_path), theirs, x)


# ---- our models, their names


@pytest.fixture
def base() -> nn.Module:
    return tiny_vit()


def trained(base: nn.Module, **options) -> nn.Module:
    config = LoRAConfig(**{"r": 2, "lora_alpha": 6, "modules_to_save": ("head",), **options})
    return randomise_trained(inject_lora(copy.deepcopy(base), config))


def in_their_library(base: nn.Module, layout: str, directory) -> nn.Module:
    """The same model in transformers or timm, from the files that save_pretrained writes."""
    if layout == "timm":
        save_pretrained(base, directory, "timm")
        sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "mlp_ratio": 2, "num_classes": 10}
        path = str(directory / "model.safetensors")
        return timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **sizes).eval()
    save_pretrained(base, directory, "transformers")
    return transformers.ViTForImageClassification.from_pretrained(directory).eval()


OURS = {
    "q, v": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"blocks.0.attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ("k_proj",)},
    "norms": {"train_norms": True},
    "six layers": {"target_modules": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")},
    "one layer": {"layers_to_transform": (1,)},
}
ours_variants = pytest.mark.parametrize("options", OURS.values(), ids=OURS)


@ours_variants
@pytest.mark.parametrize("layout", ["transformers5", "timm"])
def test_an_exported_adapter_loads_in_peft_with_the_same_logits(base, layout, options, tmp_path):
    model, x = trained(base, **options), torch.randn(2, 3, 32, 32)
    theirs = in_their_library(base, layout, tmp_path / "base")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(theirs, export_adapter(model, tmp_path / "out", layout)).eval()
    assert not [str(w.message) for w in told if "missing" in str(w.message) or "nexpected" in str(w.message)]
    # one qkv has one scaling and one vector of lengths: the adapter's numbers are converted, and rounded to float32
    converted = layout == "timm" and bool({"use_dora", "alpha_pattern"} & options.keys())
    assert_parity(model, theirs, x, float32_inside=converted)


@ours_variants
@pytest.mark.parametrize("layout", ["transformers5", "transformers4", "timm"])
def test_round_trip_ours_theirs_ours_is_bit_equal(base, layout, options, tmp_path):
    if layout == "timm" and "alpha_pattern" in options:
        options = options | {"alpha_pattern": {"blocks.0.attn.q_proj": 9}}  # one qkv has one scaling, 9/3 = 6/2
    model, x = trained(base, **options), torch.randn(2, 3, 32, 32)
    loaded = load_adapter(copy.deepcopy(base), export_adapter(model, tmp_path, layout))
    assert same_bits(lora_state_dict(loaded), lora_state_dict(model))
    assert torch.equal(loaded(x), model(x))


def test_different_scalings_inside_one_fused_qkv_stay_exact_in_function(base, tmp_path):
    model, x = trained(base, alpha_pattern={"v_proj": 5}), torch.randn(2, 3, 32, 32)
    loaded = load_adapter(copy.deepcopy(base), export_adapter(model, tmp_path, "timm"))
    assert_parity(loaded, model, x, float32_inside=True)  # B is scaled, and rounded to float32


def test_names_of_transformers_4_are_written_and_read(base, tmp_path):
    model, x = trained(base), torch.randn(2, 3, 32, 32)
    directory = export_adapter(model, tmp_path, "transformers4")
    names = set(load_file(directory / WEIGHTS))
    assert "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight" in names
    assert "base_model.model.classifier.weight" in names
    assert torch.equal(load_adapter(copy.deepcopy(base), directory)(x), model(x))


@pytest.mark.parametrize("layout", ["transformers5", "timm"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}], ids=str)
def test_an_adapter_trained_by_peft_on_their_model_loads_into_ours(base, layout, options, tmp_path):
    theirs = in_their_library(base, layout, tmp_path / "base")
    targets, head = (["qkv", "fc1"], "head") if layout == "timm" else (["q_proj", "v_proj", "fc1"], "classifier")
    theirs = by_peft(theirs, targets, tmp_path / "adapter", modules_to_save=[head], **options)
    x = torch.randn(2, 3, 32, 32)
    ours = load_adapter(base, tmp_path / "adapter").eval()
    assert_parity(ours, theirs, x)


def test_an_unknown_layout_and_a_layer_without_a_place_are_refused(base, tmp_path):
    with pytest.raises(
        UserError, match="layout 'keras' is not known to this model; it has transformers5, transformers4"
    ):
        export_adapter(trained(base), tmp_path, "keras")
    with pytest.raises(UserError, match="only its own, which save_adapter writes"):
        export_adapter(inject_lora(nn.Sequential(nn.Linear(3, 3)), LoRAConfig(target_modules=("0",))), tmp_path, "timm")


# ---- PEFT's adapters on every family of transformers, saved there and loaded into our model

FAMILIES = {  # model: (class, query, value, head, last norm)
    "beit-nano-patch8-48": ("BeitForImageClassification", "q_proj", "v_proj", "classifier", "pooler.layernorm"),
    "swin-nano-patch4-window6-48": ("SwinForImageClassification", "q_proj", "v_proj", "classifier", "layernorm"),
    "swinv2-nano-patch4-window6-48": ("Swinv2ForImageClassification", "query", "value", "classifier", "layernorm"),
    "bert-nano": ("BertModel", "query", "value", "pooler.dense", "embeddings.LayerNorm"),
    "clip-nano": ("CLIPModel", "q_proj", "v_proj", "visual_projection", "post_layernorm"),
}
SETTINGS = {
    "dora": lambda query, *_: {"use_dora": True},
    "rslora and patterns": lambda query, *_: {
        "use_rslora": True,
        "rank_pattern": {query: 3},
        "alpha_pattern": {query: 5},
    },
    "all biases": lambda *_: {"bias": "all"},
    "head and norm": lambda _, head, norm: {"modules_to_save": [head, norm]},
    "every layer": lambda *_: {"target_modules": "all-linear"},
}


def answers_of(model: nn.Module, name: str) -> torch.Tensor:
    """What ours and theirs answer to the same input."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 48, 48, generator=generator).to(next(model.parameters()).dtype)
    texts = torch.randint(5, 300, (2, 7), generator=generator)
    ours = hasattr(model, "preprocess")
    with torch.no_grad():
        if name == "bert-nano":
            found = model(texts)
            return torch.cat([found[0][:, 0], found[1]]) if ours else torch.cat([found[0][:, 0], found.pooler_output])
        if name == "clip-nano":
            return model.encode_image(images) if ours else model.get_image_features(images).pooler_output
        found = model(images)
        return found if ours else found.logits


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_trained_by_peft_on_any_family_loads_into_ours_and_survives_saving(name, setting, tmp_path):
    kind, query, value, head, norm = FAMILIES[name]
    base = fill(create_model(name, **({} if name in ("bert-nano", "clip-nano") else {"num_classes": 5})))
    save_pretrained(base, tmp_path / "base", "transformers")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    options = {"target_modules": [query, value], **setting(query, head, norm)}
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 2, **options})
    theirs = randomise_trained(peft.get_peft_model(theirs, config)).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_parity(ours, theirs, ask=lambda model: answers_of(model, name))
    save_adapter(ours, tmp_path / "ours")
    again = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    assert torch.equal(answers_of(again, name), answers_of(ours, name))
