"""Class names as sentences: logits and gradients of CLIPModel with peft, prompts, whole runs, mistakes."""

import json

import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from minilora.adapter import export_adapter
from minilora.data.generated.shapes import ShapesSplit
from minilora.errors import UserError
from minilora.inject import lora_layers, lora_state_dict
from minilora.settings.flags_evaluate import EvalConfig, evaluate_parser
from minilora.settings.parse import parse_args, read_run_config
from minilora.tasks import build_task, load_run
from minilora.tasks.classify.prompts import class_texts
from tests.support.choice_data import write_clip
from tests.support.cli_data import program, write_photos
from tests.support.parity import BOUNDS, distance

QUICK = ["--batch-size", "8", "--epochs", "1", "--device", "cpu", "--workers", "0"]
NAMES = {"class_0": "red cat, or dog", "class_1": "the right", "class_2": "who"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), "transformers")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = write_photos(tmp_path_factory.mktemp("photos"), train=6, val=4, test=2)
    (root / "classes.json").write_text(json.dumps(NAMES))
    return root


def task_of(clip, photos, *words):
    config, _ = parse_args([*QUICK, "--model", str(clip), "--data-dir", str(photos), *words])
    return build_task(config)


def first_batch(task):
    return next(iter(task.train_loader(0, task.train_batches(0))))


def randomise(model):
    """B is 0 in a fresh adapter, and half of the gradients with it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.weight.normal_(std=0.2)


# ---- the mathematics


@pytest.mark.parametrize("words", [[], ["--use-rslora"]], ids=["lora", "rslora"])
def test_logits_and_lora_gradients_are_those_of_transformers_clip_with_peft(clip, photos, words, tmp_path):
    task = task_of(clip, photos, "--lora-r", "3", "--lora-alpha", "5", "--target-modules", "q_proj", "v_proj", *words)
    randomise(task.model)
    model = task.model.double().train()
    theirs = transformers.CLIPModel.from_pretrained(clip, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(theirs, export_adapter(model, tmp_path), is_trainable=True).double()
    batch = first_batch(task) | {"image": first_batch(task)["image"].double()}
    tokens = task.tokenizer(class_texts(list(NAMES.values()), None))
    theirs_logits = theirs(
        pixel_values=batch["image"], **{key: tokens[key] for key in ("input_ids", "attention_mask")}
    ).logits_per_image
    ours = task.predictor.logits(model, batch)
    assert distance(ours, theirs_logits) < BOUNDS[torch.float64]
    F.cross_entropy(ours, batch["label"]).backward()
    F.cross_entropy(theirs_logits, batch["label"]).backward()
    named = dict(theirs.named_parameters())
    table = {entry.ours[0]: entry.theirs for entry in model.key_table("transformers5")}
    towers = set()
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            grad = named[f"base_model.model.{table[name + '.weight'][:-7]}.{part}.default.weight"].grad
            assert distance(getattr(layer, part).weight.grad, grad) < BOUNDS[torch.float64]
            assert grad.abs().max() > 0
        towers.add(name.partition(".")[0])
    assert towers == {"vision", "text"}


def test_with_a_linear_head_a_clip_is_its_picture_tower_as_in_transformers(clip, photos, tmp_path):
    """CLIPForImageClassification: the mean of the pictures' tokens, a new layer behind it, no text at all."""
    task = task_of(clip, photos, "--head", "linear", "--lora-r", "3", "--target-modules", "q_proj", "v_proj")
    randomise(task.model)
    model, image = task.model.double().train(), first_batch(task)["image"].double()
    theirs = transformers.CLIPForImageClassification.from_pretrained(clip, dtype=torch.float64, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(theirs, export_adapter(model, tmp_path), is_trainable=True).double()
    logits, wanted = model(image), theirs(pixel_values=image).logits
    assert distance(logits, wanted) < BOUNDS[torch.float64]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (logits * weights).sum().backward()
    (wanted * weights).sum().backward()
    grads = {name.partition("base_model.model.")[2]: p.grad for name, p in theirs.named_parameters()}
    table = {entry.ours[0]: entry.theirs for entry in model.key_table("transformers5")}
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            grad = grads[f"{table[name + '.weight'][:-7]}.{part}.default.weight"]
            assert distance(getattr(layer, part).weight.grad, grad) < BOUNDS[torch.float64] and grad.abs().max() > 0
    saved = {name: grad for name, grad in grads.items() if name.startswith("classifier.") and grad is not None}
    (head,) = [grad for name, grad in saved.items() if name.endswith(".weight")]
    assert distance(model.head.weight.grad, head) < BOUNDS[torch.float64]


def test_several_prompts_are_averaged_as_unit_vectors(clip, photos):
    prompts = ["a photo of a {}.", "{}, at the right"]
    task = task_of(clip, photos, "--prompt", *prompts)
    batch, model = first_batch(task), task.model.eval()
    with torch.no_grad():
        units = [
            F.normalize(model.encode_text(task.tokenizer(class_texts(list(NAMES.values()), one))["input_ids"]), dim=-1)
            for one in prompts
        ]
        texts = F.normalize(sum(units), dim=-1)
        wanted = model.logit_scale.exp() * F.normalize(model.encode_image(batch["image"]), dim=-1) @ texts.T
        assert distance(task.predictor.logits(model, batch), wanted) < BOUNDS[torch.float32]
        single = task_of(clip, photos, "--prompt", prompts[0]).predictor.logits(model, batch)
    assert distance(single, wanted) > 100 * BOUNDS[torch.float32]


@pytest.mark.parametrize(("targets", "calls"), [("vision.q_proj", 1), ("text.q_proj", 3 + 1)])
def test_sentences_are_encoded_once_where_the_text_tower_is_frozen_else_once_a_step(clip, photos, targets, calls):
    task = task_of(clip, photos, "--target-modules", targets, "--batch-size", "6")
    pooled, seen = task.model.text.pooled, []
    task.model.text.pooled = lambda *inputs: seen.append(1) or pooled(*inputs)
    for batch in task.train_loader(0, task.train_batches(0)):
        task.loss(task.model, batch)[0].backward()
    task.evaluate(task.model)
    assert len(task.train_batches(0)) == 3 and len(task.eval_batches("val")) == 1
    assert len(seen) == calls


def test_a_frozen_text_tower_gives_the_logits_of_one_that_is_asked_every_time(clip, photos):
    frozen, trained = (task_of(clip, photos, "--target-modules", t) for t in ("vision.q_proj", "all-linear"))
    batch = first_batch(frozen)
    frozen.evaluate(frozen.model.eval())
    logits = [task.predictor.logits(task.model.eval(), batch) for task in (frozen, trained)]
    assert distance(*logits) < BOUNDS[torch.float32]


def test_linear_mode_trains_both_projections_and_the_scale(clip, photos):
    task = task_of(clip, photos, "--mode", "linear", "--cache-features")
    task.loss(task.model, first_batch(task))[0].backward()
    trained = lora_state_dict(task.model)
    assert set(trained) == {"logit_scale", "visual_projection.weight", "text_projection.weight"}
    assert all(dict(task.model.named_parameters())[name].grad.abs().max() > 0 for name in trained)
    plain = task_of(clip, photos, "--mode", "linear")
    assert task.evaluate(task.model.eval()) == pytest.approx(plain.evaluate(plain.model.eval()), rel=1e-4)


# ---- whole runs


@pytest.fixture(scope="module")
def run(clip, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "names"
    words = ["--model", str(clip), "--data-dir", str(photos), "--output", str(folder), "--prompt", "a {}", "the {}"]
    assert program("train").main([*QUICK, *words, "--lr", "0.05"]) == 0
    return folder


def test_zero_shot_accuracy_stands_before_the_first_step_and_in_the_comparison(run, clip, photos, capsys):
    log = (run / "train.log").read_text().splitlines()
    first = next(i for i, line in enumerate(log) if "epoch 1" in line)
    (said,) = [line for line in log[:first] if "zero-shot" in line]
    base = task_of(clip, photos, "--prompt", "a {}", "the {}")
    scores = base.evaluate(base.model.eval())
    assert f"accuracy {100 * scores['accuracy']:.2f} % ±" in said and "baseline: chance 33.33 %" in said
    assert json.loads((run / "summary.json").read_text())["zero_shot"]["accuracy"] == scores["accuracy"]
    assert program("evaluate").main([str(run), "--report", str(run / "page.html")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("zero-shot")]
    assert f"{100 * scores['accuracy']:.2f}" in row.split()
    assert "zero-shot" in (run / "page.html").read_text()


def test_a_run_answers_with_its_own_and_with_new_class_names(run, photos, capsys):
    picture = str(next((photos / "val" / "class_0").iterdir()))
    found = load_run(run)
    own = found.predict([picture])
    assert sorted(name for name, _ in own[0]) == sorted(NAMES.values())
    labels = ["cat, dog", "the bird", "a very long name with spaces", "who"]
    assert program("evaluate").main([str(run), "--image", picture, "--classes", *labels]) == 0
    line = capsys.readouterr().out
    assert all(label in line for label in labels)
    once = found.predict([picture], classes=labels)
    assert found.predict([picture]) == own
    found.name_classes(labels)
    assert found.predict([picture]) == once
    texts = found.tokenizer([text for word in ("a {}", "the {}") for text in class_texts(labels, word)])["input_ids"]
    with torch.no_grad():
        units = F.normalize(found.model.encode_text(texts), dim=-1).view(2, 4, -1).mean(0)
        batch = {"image": torch.randn(2, 3, 32, 32)}
        image = F.normalize(found.model.encode_image(batch["image"]), dim=-1)
        wanted = found.model.logit_scale.exp() * image @ F.normalize(units, dim=-1).T
        assert distance(found.logits(batch), wanted) < BOUNDS[torch.float32]


def test_new_class_names_are_scored_on_data_of_that_name(run, tmp_path, capsys):
    pictures = ShapesSplit("target", "val", 0, range(4))
    for i, folder in enumerate(("big_Cat", "small_dog") * 2):
        (tmp_path / folder).mkdir(exist_ok=True)
        pictures.load(i).save(tmp_path / folder / f"{i}.png")
    words = [str(run), "--data-dir", str(tmp_path), "--classes"]
    assert program("evaluate").main([*words, "small dog", "fish", "big cat"]) == 0
    assert "4 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="class 'small_dog' is not a class"):
        program("evaluate").main([*words, "fish", "big cat"])


def test_a_run_is_read_back_and_resumed_with_its_prompts_and_head(run, photos, clip):
    config, _ = read_run_config(run)
    assert config.head == "names" and config.prompt == ("a {}", "the {}")
    words = ["--model", str(clip), "--data-dir", str(photos), "--output", str(run), "--prompt", "a {}", "the {}"]
    assert program("train").main([*QUICK, *words, "--lr", "0.05"]) == 0
    with pytest.raises(UserError, match="--prompt a .} here|--prompt"):
        program("train").main([*QUICK, *words[:-1], "--lr", "0.05"])


def test_the_merged_run_is_a_clip_that_transformers_loads(run, tmp_path):
    assert program("evaluate").main([str(run), "--merge-to", str(tmp_path / "out")]) == 0
    theirs, found = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval(), load_run(run)
    x, ids = torch.randn(2, 3, 32, 32), found.tokenizer(["a cat", "the dog"])["input_ids"]
    with torch.no_grad():
        assert distance(found.model(x, ids)[0], theirs(pixel_values=x, input_ids=ids).logits_per_image) < 1e-4
    assert load_run(run).tokenizer.vocab == found.tokenizer.vocab


@pytest.mark.parametrize("mode", ["linear", "full"])
def test_other_modes_leave_a_run_that_answers(mode, clip, photos, tmp_path):
    words = ["--model", str(clip), "--data-dir", str(photos), "--mode", mode, "--output", str(tmp_path / "run")]
    assert program("train").main([*QUICK, *words]) == 0
    found = load_run(tmp_path / "run")
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert found.evaluate(EvalConfig()).scores["accuracy"] == pytest.approx(best["accuracy"])


def test_a_config_from_before_head_is_linear(tmp_path):
    (tmp_path / "config.toml").write_text('task = "classify"\nmodel = "clip-nano"\n[base]\nweights = "none"\n')
    config, _ = read_run_config(tmp_path)
    assert config.head == "linear"
    task = build_task(parse_args(["--weights", "none"])[0])
    assert task.config.head == "linear" and task.zero_shot() is None


# ---- flags and mistakes


def test_prompts_and_class_names_are_never_split():
    text = "a photo, of a {}, in the sun"
    assert parse_args(["--prompt", text])[0].prompt == text
    assert parse_args(["--prompt", text, "{}, too"])[0].prompt == (text, "{}, too")
    typed, _ = evaluate_parser("").read(["--classes", "a, b", "c d"])
    assert typed["classes"] == ("a, b", "c d")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "a photo"], "must contain {} once"),
        (["--prompt", "a {}", "{} and {}"], "must contain {} once"),
        (["--prompt", " "], "--prompt needs a value"),
        (["--head", "name"], "--head must be one of names, linear"),
        (["--task", "vqa", "--head", "names"], "--head does not apply to --task vqa"),
        (["--task", "choice", "--prompt", "{question}{choice}", "{choice}{question}"], "takes one text"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words, told):
    with pytest.raises(UserError) as error:
        parse_args(words)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--head", "names", "--model", "vit-nano-patch8-48"], "is no CLIP; --head names needs one"),
        (["--prompt", "a {}"], "--prompt has no effect with --head linear"),
        (["--tokenizer", "x"], "--tokenizer has no effect with --head linear"),
    ],
)
def test_a_head_that_the_model_cannot_have_is_named(words, told, photos):
    with pytest.raises(UserError) as error:
        build_task(parse_args(["--data-dir", str(photos), *words])[0])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"class_0": "a_cat", "class_1": "A  cat"}, "'a_cat' and 'A  cat' make the same sentence"),
        ({"class_0": "_ "}, "'_ ' has no name"),
    ],
)
def test_class_names_that_make_no_sentences_are_refused(names, told, clip, tmp_path):
    root = write_photos(tmp_path, classes=3)
    (root / "classes.json").write_text(json.dumps({key: {"name": name} for key, name in names.items()}))
    with pytest.raises(UserError) as error:
        task_of(clip, root)
    assert told in str(error.value) and str(root) in str(error.value)


def test_new_class_names_need_a_run_of_sentences_and_something_to_name(run, tmp_path, photos):
    evaluate = program("evaluate").main
    with pytest.raises(UserError, match="--classes needs --image or --data-dir"):
        evaluate([str(run), "--classes", "a", "b"])
    with pytest.raises(UserError, match="make the same sentence"):
        evaluate([str(run), "--data-dir", str(photos), "--classes", "a b", "a_b"])
    linear = ["--data-dir", str(photos), "--output", str(tmp_path / "r"), "--max-steps", "1", "--weights", "none"]
    assert program("train").main([*QUICK, *linear]) == 0
    with pytest.raises(UserError, match="are no sentences"):
        evaluate([str(tmp_path / "r"), "--data-dir", str(photos), "--classes", "a", "b"])
