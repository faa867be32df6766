"""Shards: the same batches as the files, written on after an interruption, damage named, nothing else needed."""

import json
import shutil

import pytest
import torch

from minilora.commands.shards import main
from minilora.data.pictures.images import BadImage
from minilora.data.shards.files import ShardSplit
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks import build_task
from tests.support.vqa_data import write_vqa

SMALL = dict(task="vqa", weights="none", batch_size=8, device="cpu")
TINY = ["--task", "vqa", "--weights", "none", "--shard-mb", "0.03"]  # 4 pictures in a shard


@pytest.fixture
def source(tmp_path):
    return write_vqa(tmp_path / "source", 10, 4, size=64)


def write(source, target, *words) -> int:
    return main([str(source), str(target), *TINY, *words])


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_are_those_of_the_files_bit_for_bit(source, tmp_path, grouped):
    write(source, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("train-*.safetensors"))) == 3
    flags = SMALL | {"group_by_image": grouped}
    files = build_task(Config(**flags, data_dir=str(source)))
    shards = build_task(Config(**flags, data_dir=str(tmp_path / "shards")))
    assert shards.labels == files.labels
    for epoch in range(2):
        batches = files.train_batches(epoch)
        assert batches == shards.train_batches(epoch)
        for one, two in zip(files.train_loader(epoch, batches), shards.train_loader(epoch, batches), strict=True):
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    one, two = (task.evaluate(task.model.eval()) for task in (files, shards))
    assert one == two


def test_a_folder_with_questions_needs_no_task_flag(source, tmp_path):
    assert main([str(source), str(tmp_path / "shards"), *TINY[2:]]) == 0
    assert write(source, tmp_path / "shards") == 0  # the same set: nothing is refused, nothing written again
    assert len(build_task(Config(**SMALL, data_dir=str(tmp_path / "shards"))).data["val"]) == 12


def test_basic_augmentation_is_the_files_where_pictures_have_the_models_size(tmp_path):
    write(write_vqa(tmp_path / "source", 4, 2, size=48), tmp_path / "shards")
    flags = SMALL | {"augment": "basic"}
    tasks = [build_task(Config(**flags, data_dir=str(tmp_path / name))) for name in ("source", "shards")]
    one, two = (next(iter(task.train_loader(3, task.train_batches(3)))) for task in tasks)
    assert torch.equal(one["image"], two["image"])


def test_training_needs_nothing_but_the_shards(source, tmp_path):
    write(source, tmp_path / "shards")
    shutil.rmtree(source)
    task = build_task(Config(**SMALL, data_dir=str(tmp_path / "shards"), workers=2))
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    assert task.loss(task.model, batch)[0].isfinite()
    assert len(task.data["val"]) == 12 and task.describe(batch).startswith("train/picture_")


def test_interrupted_writing_goes_on_and_an_incomplete_set_is_refused(source, tmp_path, monkeypatch, capsys):
    target, load = tmp_path / "shards", torch.stack
    calls = []

    def stop(tensors):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return load(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", stop)
        with pytest.raises(KeyboardInterrupt):
            write(source, target)
    with pytest.raises(UserError, match="incomplete"):
        build_task(Config(**SMALL, data_dir=str(target)))
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert len(before) == 2
    capsys.readouterr()
    write(source, target)
    assert "train-00000" not in capsys.readouterr().out
    assert all((target / name).stat().st_mtime_ns == time for name, time in before.items())
    assert len(build_task(Config(**SMALL, data_dir=str(target))).data["train"]) == 30


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_named_and_written_again(source, tmp_path, damage):
    target = tmp_path / "shards"
    write(source, target)
    path = target / "train-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-100])
    with pytest.raises(UserError, match="train-00001.safetensors.*shard is (damaged|missing)"):
        build_task(Config(**SMALL, data_dir=str(target)))
    write(source, target)
    build_task(Config(**SMALL, data_dir=str(target)))


def test_shards_for_another_model_or_length_are_refused(source, tmp_path):
    write(source, tmp_path / "shards")
    with pytest.raises(UserError, match="image_size 48, but the model wants 64"):
        build_task(Config(**SMALL, data_dir=str(tmp_path / "shards"), image_size=64))
    with pytest.raises(UserError, match="--max-length"):
        build_task(Config(**SMALL, data_dir=str(tmp_path / "shards"), max_length=16))
    with pytest.raises(UserError, match="made in another way"):
        write(source, tmp_path / "shards", "--seed", "3")


def test_texts_longer_than_the_model_reads_are_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(UserError, match="--max-length 999: bert-nano reads at most 128 tokens"):
        write(source, tmp_path / "shards", "--max-length", "999")
    assert not (tmp_path / "shards").exists()


def test_a_damaged_index_is_named(source, tmp_path):
    write(source, tmp_path / "shards")
    for content in ("{", "{}", json.dumps({"format": "other", "shards": {}})):
        (tmp_path / "shards" / "index.json").write_text(content)
        with pytest.raises(UserError, match="index.json"):
            build_task(Config(**SMALL, data_dir=str(tmp_path / "shards")))


def test_a_broken_picture_ends_the_writing_or_is_left_out(source, tmp_path):
    (source / "train" / "picture_000000000002.png").write_bytes(b"")
    with pytest.raises(BadImage, match="picture_000000000002"):
        write(source, tmp_path / "one")
    write(source, tmp_path / "two", "--bad-data", "skip")
    task = build_task(Config(**SMALL, data_dir=str(tmp_path / "two")))
    assert len(task.data["train"]) == 27 and isinstance(task.splits.train.pictures, ShardSplit)
