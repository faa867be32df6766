"""Shards of labelled pictures: the same batches as the files, crops that depend on (seed, epoch, picture) alone."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from minilora.commands.shards import main
from minilora.data.generated.shapes import ShapesSplit
from minilora.data.pictures.batch_augment import Finish
from minilora.data.pictures.images import BadImage
from minilora.data.pictures.loader import collate
from minilora.data.shards.pictures import ShardSplit
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks import build_task, load_run
from tests.support.cli_data import QUICK, program

SMALL = dict(model="vit-nano-patch8-48", weights="none", batch_size=4, device="cpu")
TINY = ["--model", "vit-nano-patch8-48", "--weights", "none", "--shard-mb", "0.06"]  # 4 pictures in a shard


def write_sized(root, size: tuple[int, int], train: int = 5, val: int = 2):
    """Class folders whose pictures all have one size."""
    for part, each in (("train", train), ("val", val)):
        split = ShapesSplit("target", part, 0, range(8 * each))
        for i, sample in enumerate(split):
            if sample.label < 3:
                folder = root / part / f"class_{sample.label}"
                folder.mkdir(parents=True, exist_ok=True)
                split.load(i).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture
def source(tmp_path):
    return write_sized(tmp_path / "source", (70, 60))


@pytest.fixture
def shards(source, tmp_path):
    write(source, tmp_path / "shards")
    return tmp_path / "shards"


def write(source, target, *words) -> int:
    return main([str(source), str(target), *TINY, *words])


def task(folder, **flags):
    return build_task(Config(**SMALL | flags, data_dir=str(folder)))


def train_epoch(made, epoch: int = 0) -> list[dict]:
    return list(made.train_loader(epoch, made.train_batches(epoch)))


def assert_same_batches(one: list[dict], two: list[dict]) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_plain_batches_are_those_of_the_files_bit_for_bit(source, shards):
    assert len(list(shards.glob("train-*.safetensors"))) > 2
    files, stored = task(source), task(shards, data_format="shards")
    assert stored.labels == files.labels and stored.splits.keys == files.splits.keys
    assert_same_batches(train_epoch(files, 1), train_epoch(stored, 1))
    evaluation = [list(made.loader("val", [[0, 1, 2], [3, 4]])) for made in (files, stored)]
    assert_same_batches(*evaluation)


def test_a_model_that_cuts_the_middle_out_gets_the_bits_of_the_files_too(source, tmp_path):
    made = [task(source), None]
    shortest = made[0].preprocess | {"resize": "shortest", "resize_to": 54}
    from minilora.data.shards.pictures import read_picture_shards, write_picture_shards

    write_picture_shards(tmp_path / "cut", made[0].splits, shortest, 0, {}, log=lambda line: None)
    split = read_picture_shards(tmp_path / "cut").val
    from minilora.data.pictures.transforms import build_transform

    plain = build_transform(shortest)(made[0].splits.val.load(0))
    finished = Finish(shortest, "none", torch.device("cpu")).batch({"image": split.pixels(0)[None]})
    assert torch.equal(finished["image"][0], plain)


def test_training_needs_nothing_but_the_shards(source, shards):
    classes = task(source).labels
    shutil.rmtree(source)
    made = task(shards, workers=2, augment="rand")
    batch = train_epoch(made)[0]
    assert made.labels == classes and made.loss(made.model, batch)[0].isfinite()
    assert made.describe(batch).startswith("train/class_")


@pytest.mark.parametrize("augment", ["basic", "rand"])
def test_augmented_pictures_depend_on_seed_epoch_and_picture_alone(shards, augment):
    def pictures(epoch, **flags):
        found = {}
        for batch in train_epoch(task(shards, augment=augment, **flags), epoch):
            found |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
        return found

    first = pictures(1)
    for flags in ({"batch_size": 3}, {"workers": 2}):
        again = pictures(1, **flags)
        assert all(torch.equal(first[i], again[i]) for i in first)
    assert not torch.equal(first[0], pictures(2)[0]) and not torch.equal(first[0], pictures(1, seed=5)[0])


@pytest.mark.parametrize("augment", ["basic", "rand"])
def test_crops_are_drawn_where_pictures_are_read_not_where_they_are_trained_on(shards, augment, monkeypatch):
    made, own = task(shards, augment=augment), torch.get_rng_state()
    data, keys = made.data["train"], [(2, i) for i in range(4)]
    batch = collate([data[key] for key in keys])
    monkeypatch.setattr(v2.RandomResizedCrop, "make_params", None)  # nothing else knows how to draw one
    found = made.finish.batch(dict(batch))["image"]
    for i, (image, (*cut, flip)) in enumerate(zip(batch["image"], batch["box"].tolist(), strict=True)):
        size = [made.preprocess["image_size"]] * 2
        crop = v2.functional.resized_crop(image, *cut, size, made.finish.mode, antialias=True)
        crop = crop.flip(-1) if flip else crop
        if augment == "rand":
            torch.set_rng_state(batch["state"][i].clone())
            crop = v2.RandAugment()(crop)
            torch.set_rng_state(own)
        assert torch.equal(made.finish.normalised(crop[None])[0], found[i])


def test_augmentation_takes_no_random_number_of_the_model(shards):
    made = task(shards, augment="rand")
    before = torch.get_rng_state()
    train_epoch(made)
    assert torch.equal(before, torch.get_rng_state())


def test_crops_are_those_of_the_files_where_pictures_have_the_stored_size(tmp_path):
    source = write_sized(tmp_path / "source", (56, 56))
    write(source, tmp_path / "shards", "--wide", "56")
    flags = {"augment": "basic", "batch_size": 32}
    (files,), (stored,) = (train_epoch(task(tmp_path / name, **flags), 3) for name in ("source", "shards"))
    level = 1 / (255 * min(task(source).preprocess["std"]))
    assert (files["image"] - stored["image"]).abs().max() < 1.01 * level  # torchvision's rounding beside Pillow's


def test_crops_of_larger_pictures_are_near_those_of_the_files(source, shards):
    flags = {"augment": "basic", "batch_size": 32}
    (files,), (stored,) = (train_epoch(task(folder, **flags), 3) for folder in (source, shards))
    distance = (files["image"] - stored["image"]).abs().mean((1, 2, 3))
    shuffled = (files["image"] - stored["image"].roll(1, 0)).abs().mean((1, 2, 3))
    assert distance.mean() < 0.2 * shuffled.mean()


def test_a_filter_that_only_pillow_has_is_refused_with_augmentation(shards):
    preprocess = task(shards).preprocess | {"interpolation": "lanczos"}
    Finish(preprocess, "none", torch.device("cpu"))
    with pytest.raises(UserError, match="lanczos"):
        Finish(preprocess, "basic", torch.device("cpu"))


def test_interrupted_writing_goes_on(source, tmp_path, monkeypatch, capsys):
    from minilora.data.shards import pictures as picture_shards

    target, pack, calls = tmp_path / "shards", picture_shards.pack, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(picture_shards, "pack", stop)
        with pytest.raises(KeyboardInterrupt):
            write(source, target)
    with pytest.raises(UserError, match="incomplete"):
        task(target)
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    capsys.readouterr()
    write(source, target)
    assert len(before) == 2 and "train-00000" not in capsys.readouterr().out
    assert all((target / name).stat().st_mtime_ns == time for name, time in before.items())
    assert_same_batches(train_epoch(task(source)), train_epoch(task(target)))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_named_and_written_again(source, shards, damage):
    path = shards / "train-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-100])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match="train-00001.safetensors.*shard is (damaged|missing)"):
        task(shards)
    write(source, shards)
    task(shards)


def test_shards_of_another_model_task_or_plan_are_refused(source, shards):
    with pytest.raises(UserError, match="image_size 48, but the model wants 64"):
        task(shards, image_size=64)
    with pytest.raises(UserError, match="made in another way"):
        write(source, shards, "--wide", "0")
    with pytest.raises(UserError, match="these shards are for --task classify"):
        build_task(Config(task="vqa", weights="none", data_dir=str(shards), device="cpu"))
    with pytest.raises(UserError, match="choice trains from its files"):
        build_task(Config(task="choice", data_dir=str(shards), device="cpu"))
    with pytest.raises(UserError, match="no shards here"):
        task(source, data_format="shards")


@pytest.mark.parametrize("key", ["classes", "keys", "info", "parts", "preprocess", "made", "shards", "format"])
def test_a_damaged_index_is_named(shards, key):
    index = json.loads((shards / "index.json").read_text())
    for value in (None, 7, ["x"], {"../other.safetensors": 1}):
        (shards / "index.json").write_text(json.dumps(index | {key: value}))
        if value is None:
            (shards / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != key}))
        if (key, value) != ("info", {"../other.safetensors": 1}):
            with pytest.raises(UserError, match="index.json"):
                task(shards)


def test_a_broken_picture_ends_the_writing_or_is_left_out(source, tmp_path):
    broken = next((source / "train" / "class_1").iterdir())
    broken.write_bytes(b"")
    with pytest.raises(BadImage, match=broken.name):
        write(source, tmp_path / "one")
    write(source, tmp_path / "two", "--bad-data", "skip")
    assert len(task(tmp_path / "two").data["train"]) == len(task(source, bad_data="skip").data["train"]) - 1


def test_a_subset_of_shards_is_the_subset_of_the_files(source, shards):
    one, two = (task(folder, subset=0.5).splits.train for folder in (source, shards))
    assert [tuple(sample) for sample in one] == [tuple(sample) for sample in two] and isinstance(two, ShardSplit)


def test_a_run_on_shards_trains_and_is_evaluated_from_them(source, shards, tmp_path, capsys):
    words = [*QUICK, "--output", str(tmp_path / "run"), "--data-format", "shards", "--augment", "basic"]
    assert program("train").main([*words, "--data-dir", str(shards)]) == 0
    assert program("evaluate").main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    for folder in (source, shards):
        assert program("evaluate").main([str(tmp_path / "run"), "--data-dir", str(folder), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.count("accuracy") % 2 == 0 and load_run(tmp_path / "run").config.data_format == "shards"
