import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from prunegym.pruning.datasets.data import SPLITS, DataSplits, load_data
from prunegym.pruning.errors import PruningError

#: Of the small data sets written by these tests.
CLASSES = 4


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    """The embedded data set."""
    return load_data("digits")


def arrays(train: int = 80, test: int = 20, shape: tuple[int, ...] = (8, 8, 3)) -> dict[str, NDArray[Any]]:
    """Small images whose pixels all hold the image's number."""
    count = train + test
    images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, *[1] * len(shape)), (count, *shape))
    labels = np.arange(count) % CLASSES
    return {
        "x_train": images[:train],
        "y_train": labels[:train],
        "x_test": images[train:],
        "y_test": labels[train:],
    }


def write(path: Path, **content: NDArray[Any]) -> str:
    """Write an ``.npz`` file; the arguments replace those of `arrays`, None removes one."""
    kept = {key: value for key, value in {**arrays(), **content}.items() if value is not None}
    np.savez(path / "set.npz", **kept)
    return str(path / "set.npz")


def write_folder(path: Path, per_class: int, size: tuple[int, int] = (10, 10)) -> None:
    """Write class folders of plain images, each of its own grey."""
    for label in range(CLASSES):
        folder = path / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            grey = label * 50 + number
            Image.new("RGB", size, (grey, grey, grey)).save(folder / f"{number:03}.png")


def pixels(data: DataSplits, split: str, **options: Any) -> torch.Tensor:
    """All images of a split as they were stored, 0 to 255: ``(N, C, H, W)``."""
    images = torch.cat([batch for batch, _ in data[split].batches(16, **options)])
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (data.mean, data.std))
    return (images * std + mean) * 255


def read_all(name: str, **options: Any) -> None:
    """Load a data set and go through every split."""
    data = load_data(name, **options)
    for split in SPLITS:
        list(data[split].batches(8))


def test_splits_are_disjoint_and_cover_the_training_set(digits: DataSplits) -> None:
    """No image is in two splits, none is lost, and the test images are not counted in."""
    together = np.concatenate([digits.indices[split] for split in SPLITS[:-1]])

    assert np.array_equal(np.sort(together), np.arange(len(together)))
    assert len(together) + len(digits.test) == 1797
    assert all(len(digits[split]) == len(digits.indices[split]) for split in SPLITS)


def test_seed_changes_the_splits_but_not_the_test_set(digits: DataSplits) -> None:
    """Every seed is used, and no seed trains on another one's test images."""
    other = load_data("digits", seed=1)

    assert not np.array_equal(digits.indices["reward"], other.indices["reward"])
    assert torch.equal(pixels(digits, "test"), pixels(other, "test"))


def test_same_seed_gives_the_same_fingerprint(digits: DataSplits) -> None:
    """The fingerprint can be a cache key."""
    assert load_data("digits").fingerprint == digits.fingerprint
    assert load_data("digits", seed=1).fingerprint != digits.fingerprint
    assert load_data("digits", image_size=16).fingerprint != digits.fingerprint


def test_asked_sizes_are_kept(digits: DataSplits) -> None:
    """Also a smaller training split."""
    data = load_data("digits", sizes={"train": 50, "reward": 7})

    assert (len(data.train), len(data.reward), len(data.selection)) == (50, 7, len(digits.selection))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"reward": 5000}, "`--data` should have enough training images for four disjoint splits"),
        ({"train": 1400}, "`--data` should have enough training images for four disjoint splits"),
        ({"reward": 0}, "`sizes` should be at least 1"),
        ({"rewards": 10}, "Did you mean 'reward'"),
        ({"test": 10}, "The test split is the official one"),
    ],
)
def test_impossible_sizes_are_rejected(sizes: dict[str, int], message: str) -> None:
    """Splits are never silently smaller than asked."""
    with pytest.raises(PruningError, match=message):
        load_data("digits", sizes=sizes)


def test_indices_are_saved_whole(digits: DataSplits, tmp_path: Path) -> None:
    """The splits of a run can be read back without pickle, and nothing else is left in the folder."""
    digits.save_indices(tmp_path / "splits.npz")

    with np.load(tmp_path / "splits.npz", allow_pickle=False) as archive:
        assert {split: archive[split].tolist() for split in archive.files} == {
            split: indices.tolist() for split, indices in digits.indices.items()
        }
    assert [path.name for path in tmp_path.iterdir()] == ["splits.npz"]


def test_images_are_normalised_as_pretrained_weights_expect(tmp_path: Path) -> None:
    """RGB images get ImageNet's mean and deviation."""
    white = np.full((80, 8, 8, 3), 255, np.uint8)
    data = load_data(write(tmp_path, x_train=white))

    batch, labels = next(data.train.batches(4))

    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(batch[0, :, 3, 3], expected)
    assert (batch.dtype, labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8, 3), (3, 8, 8)), ((3, 8, 8), (3, 8, 8)), ((8, 8), (1, 8, 8)), ((8, 8, 1), (1, 8, 8))],
)
def test_array_layouts_are_understood(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    """Channels first, last, or none; each image keeps its label."""
    data = load_data(write(tmp_path, **arrays(shape=shape)))

    assert data.input_shape == expected
    numbers = pixels(data, "test")[:, 0, 0, 0].round().long()
    assert torch.equal(numbers % CLASSES, torch.cat([y for _, y in data.test.batches(16)]))


def test_floats_in_zero_one_are_read(tmp_path: Path) -> None:
    """They become the 256 levels they came from; labels may be a column, as Keras has them."""
    content = arrays()
    floats = {key: content[key].astype(np.float64) / 255 for key in ("x_train", "x_test")}

    data = load_data(write(tmp_path, **floats, y_train=content["y_train"][:, None]))

    assert torch.equal(pixels(data, "test").round(), pixels(load_data(write(tmp_path)), "test").round())


def test_arrays_are_resized_when_asked(tmp_path: Path) -> None:
    """A plain image keeps its colour."""
    data = load_data(write(tmp_path), image_size=12)

    assert data.input_shape == (3, 12, 12)
    assert pixels(data, "test").std(dim=(1, 2, 3)).max() < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"y_test": None}, "`--data` should hold the arrays .* without y_test"),
        ({"y_train": np.arange(79) % 4}, "one label per image.*80 images in x_train and 79 labels"),
        (
            {"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, int)},
            r"x_train of shape \(0, 8",
        ),
        ({"x_test": np.zeros((20, 9, 8, 3), np.uint8)}, "training and test images of one shape"),
        ({"x_train": np.full((80, 8, 8, 3), np.nan)}, "are not finite"),
        ({"x_train": np.full((80, 8, 8, 3), 255.0)}, r"values in \[255, 255\]"),
        ({"x_train": np.zeros((80, 8, 8, 3), np.int32)}, "Store them as uint8"),
        ({"x_train": np.zeros((80, 8, 8, 2), np.uint8)}, "1 or 3 channels"),
        ({"x_train": np.zeros((80, 64), np.uint8)}, "1 or 3 channels"),
        ({"y_train": np.arange(80) % 4 * 2}, "every class from 0.*up to 6 but 4 classes"),
        ({"y_train": np.arange(80) % 4 - 1}, "labels from 0 up.*label -1"),
        ({"y_train": np.zeros(80, int)}, "at least 2 classes"),
        ({"y_train": np.arange(80) % 4 * 10**9}, "every class from 0"),
        ({"y_test": np.full(20, 7)}, "test label 7"),
        ({"y_train": np.zeros(80)}, "one integer label per image"),
        ({"y_train": np.eye(4, dtype=int)[np.arange(80) % 4]}, "one integer label per image"),
        ({"y_train": np.array([None] * 80)}, "readable .npz of plain arrays"),
        (
            {"x_train": np.zeros((5, 8, 8, 3), np.uint8), "y_train": np.arange(5) % 4},
            "enough training images for four disjoint splits",
        ),
    ],
)
def test_faulty_arrays_are_rejected(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    """One error per fault, which says what is wrong with which array."""
    with pytest.raises(PruningError, match=message):
        load_data(write(tmp_path, **content))


def test_damaged_npz_is_rejected(tmp_path: Path) -> None:
    """Cut off, overwritten in the middle, empty, or a bare array: one error each."""
    path = Path(write(tmp_path))
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:5000] + b"\xff" * 5000 + whole[10_000:], b""):
        path.write_bytes(content)
        with pytest.raises(PruningError, match="readable .npz of plain arrays"):
            load_data(str(path))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(PruningError, match="readable .npz of plain arrays"):
        load_data(str(path))


def test_empty_zip_is_rejected(tmp_path: Path) -> None:
    """A valid archive without arrays names what is missing."""
    zipfile.ZipFile(tmp_path / "set.npz", "w").close()

    with pytest.raises(PruningError, match="without x_train, y_train, x_test, y_test .it has: nothing"):
        load_data(str(tmp_path / "set.npz"))


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_class_folders_give_every_image_once(tmp_path: Path, memory_limit: int) -> None:
    """In memory or read per batch: the same images and labels, a fifth of them for the test."""
    write_folder(tmp_path, per_class=15)

    data = load_data(str(tmp_path), memory_limit=memory_limit)

    greys = torch.cat([pixels(data, split)[:, 0, 0, 0].round() for split in SPLITS]).long()
    labels = torch.cat([y for split in SPLITS for _, y in data[split].batches(16)])
    assert data.class_names == ("class0", "class1", "class2", "class3")
    assert data.input_shape == (3, 10, 10)
    assert torch.equal(greys // 50, labels)
    assert greys.sort().values.tolist() == [50 * label + number for label in range(4) for number in range(15)]
    assert torch.cat([y for _, y in data.test.batches(16)]).bincount().tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders_are_the_official_split(tmp_path: Path, name: str) -> None:
    """Nothing of the test folder gets into training."""
    write_folder(tmp_path / "train", per_class=10)
    write_folder(tmp_path / name, per_class=2, size=(40, 20))

    data = load_data(str(tmp_path), image_size=8)

    assert len(data.test) == 8
    assert sum(len(data[split]) for split in SPLITS[:-1]) == 40
    assert data.input_shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_do_not_change_the_images(tmp_path: Path) -> None:
    """Augmentation draws from a seed per image, not from the worker."""
    write_folder(tmp_path, per_class=10, size=(16, 12))

    def draw(num_workers: int) -> torch.Tensor:
        data = load_data(str(tmp_path), image_size=8, memory_limit=0, num_workers=num_workers)
        generator = torch.Generator().manual_seed(5)
        return pixels(data, "train", shuffle=True, augment=True, generator=generator)

    assert torch.equal(draw(0), draw(2))


@pytest.mark.parametrize(("memory_limit", "num_workers"), [(2 << 30, 0), (0, 0), (0, 1)])
def test_damaged_image_is_named(tmp_path: Path, memory_limit: int, num_workers: int) -> None:
    """Whoever reads it, the error says which file it was."""
    write_folder(tmp_path, per_class=10)
    for label in range(CLASSES):
        (tmp_path / f"class{label}" / "004.png").write_bytes(b"no image")

    with pytest.raises(PruningError, match=r"`--data` should hold readable images.*004\.png"):
        read_all(str(tmp_path), memory_limit=memory_limit, num_workers=num_workers)


def test_faulty_folders_are_rejected(tmp_path: Path) -> None:
    """No classes, an empty class, no test folder, and a test class that is not in training."""
    with pytest.raises(PruningError, match="one sub-folder of images per class"):
        load_data(str(tmp_path))
    write_folder(tmp_path / "train", per_class=10)
    with pytest.raises(PruningError, match="a folder 'test' or 'val' beside 'train'"):
        load_data(str(tmp_path))
    (tmp_path / "test" / "new").mkdir(parents=True)
    with pytest.raises(PruningError, match="'new', which has no training images"):
        load_data(str(tmp_path))
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(PruningError, match="images in every class folder"):
        load_data(str(tmp_path / "train"))


def test_named_set_is_read_from_the_data_root(tmp_path: Path) -> None:
    """An ``.npz`` named after the set is enough."""
    Path(write(tmp_path)).rename(tmp_path / "svhn.npz")

    data = load_data("svhn", data_root=tmp_path)

    assert (data.name, data.num_classes, data.preparation.flip) == ("svhn", CLASSES, False)


@pytest.mark.parametrize("name", ["cifar100", "fgvc-aircraft", "imagenet", "eurosat", "stanford-cars", "svhn"])
def test_absent_torchvision_set_says_what_to_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched unless asked for."""
    monkeypatch.delenv("PRUNEGYM_DOWNLOAD", raising=False)

    with pytest.raises(PruningError, match=f"'{name}', which could not be read from .*`--data-root`"):
        load_data(name, data_root=tmp_path)


def test_torchvision_arrays_are_read(tmp_path: Path) -> None:
    """USPS in its original text form: grey 16x16 images, labels from 1 in the file."""
    import bz2

    from torchvision.datasets import USPS

    for train, count in ((True, 40), (False, 8)):
        lines = [
            f"{number % 4 + 1} " + " ".join(f"{pixel + 1}:{number / 40 - 0.5:.4f}" for pixel in range(256))
            for number in range(count)
        ]
        file = tmp_path / USPS.split_list["train" if train else "test"][1]
        file.write_bytes(bz2.compress("\n".join(lines).encode()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(USPS.split_list, "train", (*_plain(USPS, "train"), None))
        patch.setitem(USPS.split_list, "test", (*_plain(USPS, "test"), None))
        data = load_data("usps", data_root=tmp_path)

    assert (data.num_classes, data.input_shape, len(data.test)) == (4, (1, 16, 16), 8)


def _plain(dataset: Any, split: str) -> tuple[str, str]:
    """Address and file name of a split, without the checksum that our own file cannot have."""
    address, file, _ = dataset.split_list[split]
    return address, file


def test_absent_file_is_rejected() -> None:
    """A path is not mistaken for a misspelt name."""
    with pytest.raises(PruningError, match=r"`--data` should be an existing file.*absent\.npz"):
        load_data("folder/absent.npz")


def test_negative_seed_is_rejected() -> None:
    """Generators have no negative seeds."""
    with pytest.raises(PruningError, match="`seed` should be at least 0. Received -1"):
        load_data("digits", seed=-1)


def test_unknown_data_suggests_the_nearest_name() -> None:
    """A typing slip is answered with the right name."""
    with pytest.raises(PruningError, match="Did you mean 'cifar10'"):
        load_data("cifar-10")


def test_unknown_split_is_rejected(digits: DataSplits) -> None:
    """Names of splits are checked like all others."""
    with pytest.raises(PruningError, match="Did you mean 'reward'"):
        digits["rewards"]
