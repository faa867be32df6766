"""Dual encoders: VisionTextDualEncoderModel's logits and gradients, its files read and written, adapters for PEFT."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers

from minilora import LoRAConfig, export_adapter, inject_lora
from minilora.inject import lora_layers
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.load import config_for
from tests.support.parity import BOUNDS, distance, fill, pictures


def tiny(pooler: bool = False, **text):
    """dual-nano with two blocks in each tower, every tensor with values of its own."""
    config = config_for("dual-nano")
    towers = {"vision": replace(config.vision, pooler=pooler, depth=2), "text": replace(config.text, depth=2, **text)}
    return fill(create_model("dual-nano", **towers, embed_dim=32))


def texts():
    ids = torch.randint(5, 4000, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def theirs_of(folder):
    model, report = transformers.VisionTextDualEncoderModel.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("pooler", [False, True], ids=["class token, as Dinov2Model", "pooler, as ViTModel"])
def test_transformers_loads_what_is_written_and_gives_the_same_logits(pooler, tmp_path):
    model, x = tiny(pooler), pictures(48, 3).double()
    theirs = theirs_of(save_pretrained(model, tmp_path, "transformers"))
    kind = theirs.config.vision_config.model_type
    assert kind == ("vit" if pooler else "dinov2")
    ours, wanted = model.double()(x, **texts())[0], theirs(pixel_values=x, **texts()).logits_per_image
    assert distance(ours, wanted) < BOUNDS[torch.float64]


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "minilora"])
def test_what_was_written_is_read_back_bit_for_bit(layout, pooler, tmp_path):
    model = tiny(pooler)
    again = load_pretrained(save_pretrained(model, tmp_path, layout))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(model(pictures(48), **texts())[0], again(pictures(48), **texts())[0])


@pytest.mark.parametrize("pooler", [False, True])
def test_a_model_that_transformers_wrote_is_read(pooler, tmp_path):
    model = tiny(pooler)
    theirs = theirs_of(save_pretrained(model, tmp_path / "ours", "transformers")).float()
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(tmp_path / "theirs")
    assert distance(again(pictures(48), **texts())[0], model(pictures(48), **texts())[0]) < BOUNDS[torch.float32]


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_adapter_loads_in_peft_with_the_same_logits_and_gradients(pooler, rslora, tmp_path):
    model = tiny(pooler)
    save_pretrained(model, tmp_path / "base", "transformers")
    options = {"modules_to_save": model.head_modules, "use_rslora": rslora, "init_lora_weights": False}
    inject_lora(model, LoRAConfig(3, 5.0, 0.0, ("q_proj", "v_proj", "fc1"), **options))
    with torch.no_grad():
        for parameter in (model.logit_scale, model.visual_projection.weight, model.text_projection.weight):
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = export_adapter(model, tmp_path / "adapter", "transformers5")
    theirs = peft.PeftModel.from_pretrained(theirs_of(tmp_path / "base"), folder, is_trainable=True).double()
    x = pictures(48).double()
    wanted = theirs(pixel_values=x, **texts()).logits_per_image
    ours = model.double()(x, **texts())[0]
    assert distance(ours, wanted) < BOUNDS[torch.float64]
    ours.sin().sum().backward()
    wanted.sin().sum().backward()
    names = {entry.ours[0]: entry.theirs for entry in model.key_table("transformers5")}
    parameters = dict(theirs.named_parameters())
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            grad = parameters[f"base_model.model.{names[name + '.weight'][:-7]}.{part}.default.weight"].grad
            assert distance(getattr(layer, part).weight.grad, grad) < BOUNDS[torch.float64], name


def test_a_text_tower_with_another_vector_is_no_model_of_transformers(tmp_path):
    with pytest.raises(ModelError, match="takes the pooler's vector of a text, this model the mean of the tokens"):
        save_pretrained(tiny(pooling="mean"), tmp_path, "transformers")
    model = tiny(pooling="mean")
    again = load_pretrained(save_pretrained(model, tmp_path, "minilora"))
    assert torch.equal(model(pictures(48), **texts())[0], again(pictures(48), **texts())[0])


def test_layer_scales_that_are_not_one_are_refused(tmp_path):
    save_pretrained(tiny(), tmp_path / "ours", "transformers")
    theirs = theirs_of(tmp_path / "ours")
    with torch.no_grad():
        theirs.vision_model.encoder.layer[1].layer_scale1.lambda1.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="layer.1.layer_scale1.lambda1 is not 1 everywhere"):
        load_pretrained(tmp_path / "theirs")


def test_a_tower_that_is_not_known_is_named(tmp_path):
    save_pretrained(tiny(), tmp_path, "transformers")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"model_type": "bert"', '"model_type": "roberta"'))
    with pytest.raises(ModelError, match="a text tower 'roberta' is not supported"):
        load_pretrained(tmp_path)
