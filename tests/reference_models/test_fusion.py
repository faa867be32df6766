"""Two-tower models and the student: counts of the reports, pictures encoded once, precomputed features, files."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora import LoRAConfig, count_parameters, inject_lora
from minilora.inject import lora_layers
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.fusion import FUSIONS, TwoTower

HEAD = ("fusion", "head")


@pytest.fixture(scope="module")
def counts(shared) -> dict:
    return json.loads((Path(shared) / "param_counts.json").read_text())


def tiny(**options) -> TwoTower:
    vision = create_model("vit-nano-patch8-48", num_classes=3, dim=32, depth=2, heads=2, hidden=48)
    text = create_model("bert-nano", dim=24, depth=2, heads=2, hidden=40, vocab_size=50)
    return TwoTower(vision, text, num_classes=5, **options).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 6])[:, None]).long()
    return {
        "images": torch.randn(2, 3, 48, 48, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "image_index": torch.tensor([1, 0, 1, 1]),
    }


def test_counts_equal_those_of_report_1(counts):
    with torch.device("meta"):
        model = create_model("vqa-vit-bert")
        assert count_parameters(model).total == counts["vqa_vit_bert_total"]
        assert count_parameters(model.vision).total == counts["vit_base_with_pooler"]
        assert count_parameters(model.text).total == counts["bert_base_with_pooler"]
        head = count_parameters(model.fusion).total + count_parameters(model.head).total
        assert head == counts["vqa_head_1536_128_1000"]
        inject_lora(model, LoRAConfig(r=64, modules_to_save=HEAD))
        wanted = (counts["vqa_lora_r64_trainable_with_head"], counts["vqa_lora_r64_all"])
        assert count_parameters(model) == wanted
        encoders = count_parameters(model.vision).trainable + count_parameters(model.text).trainable
        assert encoders == counts["vqa_lora_r64_trainable_encoders"]
        assert count_parameters(model.vision).total == counts["vit_lora_r64_total"]
        model = inject_lora(create_model("vqa-vit-bert"), LoRAConfig(r=8, modules_to_save=HEAD))
        assert count_parameters(model).trainable == counts["vqa_lora_r8_trainable_with_head"]


def test_counts_equal_those_of_report_5s_teacher(counts):
    with torch.device("meta"):
        model = create_model("vqa-mobilenet-bert", num_classes=10)
    parts = {
        "teacher_bert_dense": model.fusion.text_proj,
        "teacher_image_dense": model.fusion.image_proj,
        "teacher_dense32": model.fusion.fc,
        "teacher_classifier": model.head,
    }
    for name, module in parts.items():
        assert count_parameters(module).total == counts[name], name
    total = count_parameters(model).total
    assert total == 127_968_106
    assert total + sum(buffer.numel() for buffer in model.buffers()) == counts["teacher_total"]
    model.vision.requires_grad_(False)
    model.text.requires_grad_(False)
    assert count_parameters(model).trainable == counts["teacher_trainable"]


def test_counts_equal_those_of_report_5s_student_with_one_and_two_biases(counts):
    with torch.device("meta"):
        model = create_model("student")
        assert count_parameters(model).total == counts["student_total"]
        assert count_parameters(model.text.lstm).total == counts["student_lstm_keras"]
        assert count_parameters(model.text.word).total == counts["student_embedding_30523x256"]
        assert count_parameters(model.vision.conv1).total == counts["student_conv1"]
        assert count_parameters(model.vision.conv2).total == counts["student_conv2"]
        assert count_parameters(model.vision.fc).total == counts["student_image_dense"]
        two = create_model("student", single_bias=False)
        assert count_parameters(two.text.lstm).total == counts["student_lstm_torch_two_biases"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_shared_picture_is_encoded_once_and_gives_the_same_logits(fusion, batch):
    model = tiny(fusion=fusion)
    seen = []
    model.vision.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.no_grad():
        logits = model(**batch)
        repeated = {**batch, "images": batch["images"][batch["image_index"]], "image_index": None}
        assert torch.allclose(model(**repeated), logits, atol=1e-6)
    assert logits.shape == (4, 5) and seen == [2, 4]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_precomputed_features_replace_their_inputs_bit_for_bit(fusion, batch):
    model = tiny(fusion=fusion)
    with torch.no_grad():
        image = model.encode_image(batch["images"])
        text = model.encode_text(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        expected = model(**batch)
        index = batch["image_index"]
        assert torch.equal(model(image_features=image, text_features=text, image_index=index), expected)
        words = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
        assert torch.equal(model(image_features=image, image_index=index, **words), expected)


def test_both_fusions_compute_their_formulas():
    image, text = torch.randn(3, 32), torch.randn(3, 24)
    model = tiny(fusion="concat")
    f = model.fusion
    assert torch.allclose(f(image, text), torch.cat([image, text], 1) @ f.fc.weight.T + f.fc.bias, atol=1e-6)
    model = tiny(fusion="product")
    f = model.fusion
    product = torch.relu(f.image_proj(image)) * f.text_proj(text)
    assert product.shape == (3, 256) and torch.allclose(f(image, text), f.fc(product), atol=1e-6)
    assert isinstance(f.dropout, nn.Dropout) and f.dropout.p == 0.2


def test_concat_product_is_its_formula_in_value_and_gradient(batch):
    """Against the pooled vector, the largest values over the tokens and two projections, written out in float64."""
    model = tiny(fusion="concat-product").double()
    batch = batch | {"images": batch["images"].double()}
    f = model.fusion

    def half(x, norm, proj):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
        x = x @ proj.weight.T + proj.bias
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    tokens = model.vision.forward_features(batch["images"])
    image = torch.cat([model.vision.pooled(batch["images"]), tokens.max(1).values], 1)[batch["image_index"]]
    text = model.text.pooled(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    i, t = half(image, f.image_norm, f.image_proj), half(text, f.text_norm, f.text_proj)
    wanted = torch.cat([i, t, i * t], 1) @ model.head.weight.T + model.head.bias
    logits = model(**batch)
    assert logits.shape == (4, 5) and model.num_features == 3 * 512
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x.sin().sum(), parameters, retain_graph=True) for x in (logits, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


PICTURES = {
    "vit-nano-patch8-48": {},
    "beit-nano-patch8-48": {},
    "swin-nano-patch4-window6-48": {},
    "swinv2-nano-patch4-window6-48": {},
    "mobilenet-v2": {"width": 0.25, "image_size": 64},
}


@pytest.mark.parametrize("name", PICTURES)
def test_pooled_is_the_pool_of_all_tokens(name):
    model = create_model(name, num_classes=0, **PICTURES[name]).eval().double()
    x = torch.randn(2, 3, model.config.image_size, model.config.image_size, dtype=torch.float64)
    torch.testing.assert_close(model.pooled(x), model.pool(model.forward_features(x)), rtol=1e-9, atol=1e-9)


def test_every_adapter_of_both_towers_learns(batch):
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    config = LoRAConfig(r=2, target_modules=targets, modules_to_save=HEAD, init_lora_weights=False)
    model = inject_lora(tiny(), config)
    model(**batch).sin().sum().backward()
    assert len(list(lora_layers(model))) == 2 * 2 * 6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("pair", [("clip", "bert"), ("clip", "clip"), ("mobilenet", "clip")])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_any_picture_encoder_goes_with_any_text_encoder(pair, fusion, tmp_path):
    clip = create_model("clip-nano", vision_depth=1, text_depth=1, vocab_size=50)
    vision = clip.vision if pair[0] == "clip" else create_model("mobilenet-v2", width=0.25, image_size=64)
    text = clip.text if pair[1] == "clip" else create_model("bert-nano", depth=1, vocab_size=50)
    model = TwoTower(vision, text, num_classes=4, fusion=fusion).eval()
    side = model.preprocess["image_size"]
    x, ids = torch.randn(2, 3, side, side), torch.randint(1, 50, (2, 6))
    logits = model(x, ids)
    assert logits.shape == (2, 4)
    again = load_pretrained(save_pretrained(model, tmp_path)).eval()
    assert torch.equal(again(x, ids), logits) and again.preprocess == model.preprocess


@pytest.mark.parametrize("name", ["vqa-nano", "student-nano"])
def test_saved_models_come_back_with_the_same_bits(name, tmp_path):
    model = create_model(name, num_classes=3)
    model.labels = ["no", "two", "yes"]
    again = load_pretrained(save_pretrained(model, tmp_path))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert again.config == model.config and again.labels == model.labels
    with pytest.raises(ModelError, match="cannot be written in the layout 'timm'"):
        save_pretrained(model, tmp_path, "timm")


def test_student_reads_the_last_real_token_and_one_bias_is_not_trained():
    model = create_model("student-nano").eval()
    ids = torch.randint(1, 4000, (2, 6))
    padded, mask = (torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1), torch.ones(2, 9, dtype=torch.long))
    mask[:, 6:] = 0
    assert torch.allclose(model.text.pooled(padded, mask), model.text.pooled(ids), atol=1e-6)
    two = create_model("student-nano", single_bias=False).eval()
    state = {**model.state_dict(), "text.lstm.bias_hh_l0": torch.zeros(256)}
    two.load_state_dict(state)
    x = torch.randn(2, 3, 48, 48)
    assert torch.allclose(two(x, ids), model(x, ids), atol=1e-6)
    model.train()(x, ids).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_unknown_fusions_and_unequal_widths_are_named():
    with pytest.raises(ModelError, match="concat, product, concat-product"):
        tiny(fusion="sum")
    with pytest.raises(ValueError, match="equal widths, not 32 and 24"):
        tiny(fusion="product", inner=0)
