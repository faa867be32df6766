"""PEFT, transformers and timm: the same mathematics, the same files, in both directions."""

import copy
import json
import warnings

import peft
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import LoRAConfig, export_adapter, inject_lora, load_adapter, save_adapter
from minilora.errors import UserError
from minilora.inject import lora_layers, lora_state_dict
from reference_models import create_model, load_pretrained, save_pretrained
from tests.support.helpers import randomise, randomise_trained, same_bits, tiny_vit
from tests.support.parity import assert_parity, distance, fill

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


# ---- PEFT's adapters on patch projections and on one tower; what does not fit; old forms


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "all"}], ids=str)
@pytest.mark.parametrize(
    ("layout", "targets"),
    [("timm", ["patch_embed.proj"]), ("timm", ["qkv", "proj"]), ("transformers5", ["projection", "q_proj"])],
    ids=["timm, alone", "timm, all proj", "transformers"],
)
def test_lora_on_the_patch_projection_loads_and_is_written_back(base, layout, targets, options, tmp_path):
    theirs = in_their_library(base, layout, tmp_path / "base")
    head = "head" if layout == "timm" else "classifier"
    theirs = by_peft(theirs, targets, tmp_path / "adapter", modules_to_save=[head], **options)
    ours, x = load_adapter(copy.deepcopy(base), tmp_path / "adapter").eval(), torch.randn(2, 3, 32, 32)
    assert "patch_embed.proj" in dict(lora_layers(ours)) and ours.patch_embed.proj.lora_B.weight.abs().max() > 0
    assert_parity(ours, theirs, x)
    if options.get("bias") != "all":
        again = load_adapter(copy.deepcopy(base), export_adapter(ours, tmp_path / "out", layout))
        assert same_bits(lora_state_dict(again), lora_state_dict(ours))
        plain = in_their_library(base, layout, tmp_path / "again")
        assert_parity(again, peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval(), x, float32_inside=True)


def clip_and_tower(folder, tower: str, same_width: bool):
    """(our CLIP, PEFT's model of one of its towers, the adapter's folder)."""
    sizes = dict(vision_dim=64, vision_heads=4, vision_hidden=96, vision_depth=2, image_size=48)
    text = 64 if same_width else 48
    sizes |= dict(text_dim=text, text_heads=4, text_hidden=96 * text // 64, text_depth=2)
    model = fill(create_model("clip-nano", **sizes))
    save_pretrained(model, folder / "base", "transformers")
    kind = {"vision": transformers.CLIPVisionModel, "text": transformers.CLIPTextModel}[tower]
    theirs = kind.from_pretrained(folder / "base")
    return model, by_peft(theirs, ["q_proj", "fc1"], folder / "adapter"), folder / "adapter"


@pytest.mark.parametrize("same_width", [True, False])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_an_adapter_of_one_tower_of_a_clip_goes_to_that_tower(tower, same_width, tmp_path):
    model, theirs, folder = clip_and_tower(tmp_path, tower, same_width)
    ours = load_adapter(copy.deepcopy(model), folder).eval()
    assert {name.split(".")[0] for name, _ in lora_layers(ours)} == {tower}
    x = torch.randn(2, 3, 48, 48) if tower == "vision" else torch.randint(5, 300, (2, 7))
    if tower == "text":
        x[:, -1] = model.config.eos_token_id
    with torch.no_grad():
        pooled = theirs(pixel_values=x) if tower == "vision" else theirs(input_ids=x)
        projection = ours.visual_projection if tower == "vision" else ours.text_projection
        found = (ours.encode_image if tower == "vision" else ours.encode_text)(x)
        assert distance(found, projection(pooled.pooler_output)) < 1e-5
    change(folder, lambda tensors: None, lambda config: config.pop("auto_mapping"))
    if same_width:
        with pytest.raises(UserError, match=r"fits vision_model\.\* and text_model\.\* alike; write the one"):
            load_adapter(copy.deepcopy(model), folder)
        named = lambda tensors: {k.replace("model.enc", f"model.{tower}_model.enc"): t for k, t in tensors.items()}  # noqa: E731
        change(folder, named)
    again = load_adapter(copy.deepcopy(model), folder).eval()
    assert same_bits(lora_state_dict(again), lora_state_dict(ours))


def change(folder, tensors=None, config=None):
    """Edit both files of an adapter; `tensors` returns what the file shall hold, or edits in place."""
    state = load_file(folder / WEIGHTS)
    state = (tensors(state) if tensors else None) or state
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / WEIGHTS)
    data = json.loads((folder / "adapter_config.json").read_text())
    if config:
        config(data)
    (folder / "adapter_config.json").write_text(json.dumps(data))


def test_of_an_adapter_that_fits_but_for_a_tensor_that_one_is_named(base, tmp_path):
    theirs = in_their_library(base, "timm", tmp_path / "base")
    by_peft(theirs, ["qkv"], tmp_path / "adapter", modules_to_save=["head"])
    whole, count = copy.deepcopy(base), len(load_file(tmp_path / "adapter" / WEIGHTS))
    wrong, other = (f"base_model.model.blocks.0.attn.qkv.lora_{matrix}.weight" for matrix in "AB")
    cases = {
        "fc_norm.weight": lambda s: s | {"base_model.model.fc_norm.weight": torch.ones(3)},
        "blocks.0.attn.qkv.lora_A.weight (": lambda s: s | {wrong: torch.ones(4, 7)},
        "blocks.0.attn.qkv.lora_B.weight ((72,),": lambda s: s | {other: s[other][:, 0].contiguous()},
        "head.weight (": lambda s: s | {"base_model.model.head.weight": torch.ones(9, 7)},
    }
    original = load_file(tmp_path / "adapter" / WEIGHTS)
    for name, edit in cases.items():
        change(tmp_path / "adapter", lambda _, edit=edit: edit(original))
        total = count + (name == "fc_norm.weight")
        with pytest.raises(UserError, match="does not fit this model: 1 of its") as error:
            load_adapter(whole, tmp_path / "adapter")
        assert name in str(error.value) and f"1 of its {total} tensors" in str(error.value)
    change(tmp_path / "adapter", lambda _: original | {other: original[other][:, :1].contiguous()})
    with pytest.raises(UserError, match="blocks.0.attn.qkv.lora_A has rank 2, its lora_B 1"):
        load_adapter(whole, tmp_path / "adapter")
    assert not list(lora_layers(whole))


def test_old_forms_of_pefts_files_are_each_named_in_a_sentence(base, tmp_path):
    theirs = in_their_library(base, "timm", tmp_path / "base")
    theirs = by_peft(theirs, ["qkv"], tmp_path / "adapter")
    folder, path = tmp_path / "adapter", tmp_path / "adapter" / "adapter_config.json"
    good, x = path.read_text(), torch.randn(1, 3, 32, 32)
    path.write_bytes(b"\xef\xbb\xbf" + good.encode())  # as an editor of Windows leaves it
    assert_parity(load_adapter(copy.deepcopy(base), folder).eval(), theirs, x)
    for key, value, word in (
        ("enable_lora", [True, False, True], "PEFT 0.2"), ("fan_in_fan_out", True, "GPT-2's Conv1D"),
        ("r", 10**400, "r must be"), ("r", "8", "r must be"), ("lora_alpha", 10**400, "lora_alpha must be"),
        ("lora_alpha", 1e308, "lora_alpha must be"), ("layers_to_transform", "abc", "layers_to_transform must be"),
        ("layers_to_transform", [1, "a"], "layers_to_transform must be"), ("use_dora", "false", "use_dora must be"),
        ("rank_pattern", {"q": 10**30}, r"rank_pattern\['q'\] must be"), ("target_modules", ["q", 3], "target_modules"),
        ("alpha_pattern", {"(a)\\1": 3}, "not supported"), ("layers_to_transform", [-1], "layers_to_transform must be"),
    ):  # fmt: skip
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        with pytest.raises(UserError, match=word):
            load_adapter(copy.deepcopy(base), folder)
    path.write_text(good)
    change(folder, lambda s: {k: t[..., None] if "lora_B" in k else t for k, t in s.items()})
    with pytest.raises(UserError, match="three dimensions: PEFT 0.2"):
        load_adapter(base, folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle.*save_file"):
        load_adapter(base, folder)


def test_layers_pattern_is_read_from_the_names_in_the_file(base, tmp_path):
    theirs = in_their_library(base, "transformers5", tmp_path / "base")
    options = {"layers_to_transform": [1], "layers_pattern": "layers"}
    theirs = by_peft(theirs, ["q_proj"], tmp_path / "adapter", **options)
    ours, x = load_adapter(base, tmp_path / "adapter").eval(), torch.randn(1, 3, 32, 32)
    assert [name for name, _ in lora_layers(ours)] == ["blocks.1.attn.q_proj"]
    assert_parity(ours, theirs, x)


def test_patterns_in_a_file_cannot_hang_the_loading_of_an_adapter(base, tmp_path):
    save_adapter(trained(base), tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for pattern in (r"(([a-z0-9_]+)+\.?)+!", "(a|[a-z._0-9])*!", ".*" * 9 + "!"):
        path.write_text(json.dumps(good | {"target_modules": pattern}))
        with pytest.raises(UserError, match="matches no linear layer"):
            load_adapter(copy.deepcopy(base), tmp_path)
        patterns = {"rank_pattern": {pattern: 3}, "alpha_pattern": {f"({pattern})+": 7}}
        path.write_text(json.dumps(good | patterns))
        load_adapter(copy.deepcopy(base), tmp_path)  # they fit no name, so nothing changes
    for pattern in ("(" * 5000 + ")" * 5000, "(" * 400 + "a" + ")" * 400):
        path.write_text(json.dumps(good | {"target_modules": pattern}))
        with pytest.raises(UserError, match="target_modules must be names or one regular expression"):
            load_adapter(copy.deepcopy(base), tmp_path)
