"""Batches: the same bits for any number of workers, from any place in an epoch, and rows that never shift."""

import pickle

import pytest
import torch
from PIL import Image

from minilora.data.generated.shapes import classification_splits
from minilora.data.pictures.folder import Sample, Split
from minilora.data.pictures.images import BadImage
from minilora.data.pictures.loader import PictureDataset, collate, epoch_order, in_order, make_loader, mix

PREPROCESS = {"image_size": 24, "resize": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


def shapes(augment="rand", seed=0):
    return PictureDataset(classification_splits(train=24).train, PREPROCESS, augment, seed)


def images(dataset, batches, **options):
    return torch.cat([batch["image"] for batch in make_loader(dataset, batches, **options)])


def augmented(batches, epoch):
    """The keys of augmented items."""
    return [[(epoch, i) for i in batch] for batch in batches]


@pytest.fixture
def broken(tmp_path):
    Image.new("RGB", (30, 30), (200, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    return Split([Sample("good.png", 0), Sample("bad.png", 1), Sample("good.png", 2)], tmp_path)


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    order = epoch_order(23, 5, seed=1, epoch=2)
    assert [len(batch) for batch in order] == [5, 5, 5, 5, 3]
    assert sorted(sum(order, [])) == list(range(23))
    assert order == epoch_order(23, 5, 1, 2) != epoch_order(23, 5, 1, 3) != epoch_order(23, 5, 2, 2)
    assert in_order(5, 2) == [[0, 1], [2, 3], [4]] and epoch_order(0, 4, 0, 0) == in_order(0, 4) == []


def test_mixed_seeds_do_not_collide():
    seeds = {mix(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1) and mix(0) != mix(0, 0)


@pytest.mark.parametrize("augment", ["basic", "rand"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(augment):
    x = shapes(augment)[(3, 7)]["image"]
    torch.manual_seed(99)
    assert torch.equal(x, shapes(augment)[(3, 7)]["image"])
    for other in (shapes(augment)[(4, 7)], shapes(augment, seed=1)[(3, 7)], shapes(augment)[7]):
        assert not torch.equal(x, other["image"])


def test_loading_takes_nothing_from_the_random_numbers_of_the_model():
    state = torch.get_rng_state()
    images(shapes(), augmented(epoch_order(24, 8, 0, 0), 0))
    images(shapes(), in_order(24, 8), workers=1)
    assert torch.equal(state, torch.get_rng_state())


def test_workers_and_a_resumed_epoch_give_the_same_bits():
    keys = augmented(epoch_order(24, 5, 0, 1), 1)
    plain = images(shapes(), keys)
    assert torch.equal(plain, images(shapes(), keys, workers=2))
    assert torch.equal(plain[10:], images(shapes(), keys[2:], workers=1))
    dataset = shapes()
    assert torch.equal(images(dataset, keys), images(dataset, keys))  # the second time from memory


def test_batch_has_the_promised_tensors():
    batch = next(make_loader(shapes(), [[(0, 3), (0, 5)]]))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((2, 3, 24, 24), torch.float32),
        "label": ((2,), torch.int64),
        "index": ((2,), torch.int64),
        "valid": ((2,), torch.bool),
    }
    assert batch["label"].tolist() == [3, 5] and batch["valid"].all()
    assert collate([{"name": "a", "x": 1.5}, {"name": "b", "x": 2.5}])["name"] == ["a", "b"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_stops_with_its_name_or_is_marked_in_its_row(broken, workers):
    with pytest.raises(BadImage, match="bad.png: is not a picture") as caught:
        list(make_loader(PictureDataset(broken, PREPROCESS), [[0, 1], [2]], workers))
    assert "\n" not in str(caught.value)
    batches = list(make_loader(PictureDataset(broken, PREPROCESS, bad_data="skip"), [[0, 1], [2]], workers))
    assert torch.cat([batch["valid"] for batch in batches]).tolist() == [True, False, True]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 1, 2]
    assert batches[0]["image"][1].abs().sum() == 0 and torch.equal(batches[0]["image"][0], batches[1]["image"][0])


def test_pictures_are_kept_while_there_is_room(broken, monkeypatch):
    from minilora.data.pictures.loader import Pictures

    opened = []
    monkeypatch.setattr(type(broken), "load", lambda split, i: opened.append(i) or Image.new("RGB", (10, 10)))
    pictures = Pictures(broken, cache_bytes=650)  # two of 300 bytes
    for i in (0, 1, 2, 0, 1, 2):
        pictures[i]
    assert opened == [0, 1, 2, 2]


def test_data_set_can_be_sent_to_a_spawned_worker():
    copy = pickle.loads(pickle.dumps(shapes()))
    assert torch.equal(copy[(0, 1)]["image"], shapes()[(0, 1)]["image"])
