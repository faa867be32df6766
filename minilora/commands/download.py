"""Fetch and unpack the public data sets of the recipes.

    python -m minilora.commands.download imagewoof DIR      # 0.3 GB, class folders
    python -m minilora.commands.download vqa2 DIR           # 20 GB, questions and COCO pictures
    python -m minilora.commands.download visual7w DIR       # 1.8 GB, questions and pictures

An archive is downloaded beside its final place, compared with the size and checksum that are known
of it, looked through for members that would land outside DIR (nothing is unpacked then), unpacked
and removed. What is complete is noted in DIR/.downloaded.json, so that the command can be repeated
after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.error import URLError

from torchvision.datasets.utils import calculate_md5, download_url

from minilora.errors import RunError, UserError
from minilora.settings import exit_codes as cli

# environment variable: take every archive from this base address instead
MIRROR = "MINILORA_MIRROR"
NOTES = ".downloaded.json"


@dataclass(frozen=True)
class Archive:
    """One file to fetch, and what is known of it before it is here."""

    url: str
    size: int | None = None  # bytes
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class DataSet:
    """The archives of a data set and what they become."""

    archives: tuple[Archive, ...]
    folder: str  # what --data-dir becomes, below DIR
    recipe: str
    pictures: int | None = None  # how many there must be in the end


VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
COCO = "http://images.cocodataset.org/zips"
SETS = {
    "imagewoof": DataSet(
        (Archive("https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz"),),
        "imagewoof2-320",
        "imagewoof-vit-tiny",
        pictures=12_954,
    ),
    "vqa2": DataSet(
        (
            Archive(f"{VQA}/v2_Questions_Train_mscoco.zip", 7_239_401),
            Archive(f"{VQA}/v2_Questions_Val_mscoco.zip", 3_494_929),
            Archive(f"{VQA}/v2_Annotations_Train_mscoco.zip", 21_708_861),
            Archive(f"{VQA}/v2_Annotations_Val_mscoco.zip", 10_518_930),
            Archive(f"{COCO}/train2014.zip", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
            Archive(f"{COCO}/val2014.zip", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        ),
        "",
        "vqa-vit-bert",
    ),
    "visual7w": DataSet(
        (
            Archive("https://ai.stanford.edu/~yukez/papers/resources/dataset_v7w_telling.zip"),
            Archive("http://vision.stanford.edu/yukezhu/visual7w_images.zip"),
        ),
        "",
        "choice-clip",
    ),
}


def fetch(name: str, directory: str | os.PathLike, mirror: str | None = None) -> Path:
    """Download and unpack the data set `name` below `directory`; returns the folder for --data-dir.

    Raises UserError for an unknown name, RunError for what the network, the archive
    or the disk does.
    """
    if name not in SETS:
        raise UserError(f"data set {name!r} is unknown; choose from {', '.join(SETS)}")
    wanted, root = SETS[name], Path(directory)
    mirror = mirror or os.environ.get(MIRROR)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error.strerror})") from None
    notes = root / NOTES
    done = _read_notes(notes)
    for archive in wanted.archives:
        if archive.name in done:
            print(f"{archive.name}: already there")
            continue
        path = _download(archive, root, f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url)
        count = unpack(path, root)
        path.unlink()
        done.append(archive.name)
        notes.write_text(json.dumps(done))
        print(f"{archive.name}: {count} files unpacked")
    _count_pictures(root / wanted.folder, wanted.pictures)
    return root / wanted.folder


def _read_notes(path: Path) -> list[str]:
    """Names of the archives that are unpacked; notes that cannot be read count as none."""
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) else []


def _download(archive: Archive, root: Path, url: str) -> Path:
    """The archive in `root`, complete and checked; half a download never has its final name."""
    path, part = root / archive.name, root / f"{archive.name}.part"
    if path.is_file():
        return path
    part.unlink(missing_ok=True)
    try:
        download_url(url, str(root), part.name)
    except (URLError, OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{url}: download failed ({error}); repeat the command to try again") from None
    size = part.stat().st_size
    if archive.size is not None and size != archive.size:
        part.unlink()
        raise RunError(f"{url}: got {size:,} bytes instead of {archive.size:,}; repeat the command to try again")
    if archive.md5 is not None and calculate_md5(str(part)) != archive.md5:
        part.unlink()
        raise RunError(f"{url}: the checksum differs from {archive.md5}; repeat the command to try again")
    os.replace(part, path)
    return path


def unpack(path: Path, root: Path) -> int:
    """Unpack a .zip or .tar(.gz) into `root`; returns the number of files.

    Every member is checked before the first is written: absolute paths, `..`, links and
    devices raise RunError.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                for member in members:
                    kind = stat.S_IFMT(member.external_attr >> 16)
                    _check_member(path, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                _check_space(path, root, sum(member.file_size for member in members))
                archive.extractall(root)
                return sum(not member.is_dir() for member in members)
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            for member in members:
                _check_member(path, member.name, member.isfile() or member.isdir())
            _check_space(path, root, sum(member.size for member in members))
            archive.extractall(root, members=members, filter="data")
            return sum(member.isfile() for member in members)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be unpacked ({error}); delete it and repeat the command") from None


def _check_member(path: Path, name: str, plain: bool) -> None:
    slashed = name.replace("\\", "/")
    outside = slashed.startswith("/") or ".." in PurePosixPath(slashed).parts or PureWindowsPath(name).drive
    if outside or not plain:
        reason = "would land outside the folder" if outside else "is a link or a device"
        raise RunError(f"{path}: member {name!r} {reason}; nothing was unpacked, do not use this archive")


def _check_space(path: Path, root: Path, size: int) -> None:
    free = shutil.disk_usage(root).free
    if size > free:
        raise RunError(f"{path}: needs {size / 1e9:.1f} GB unpacked, {root} has {free / 1e9:.1f} GB free")


def _count_pictures(folder: Path, expected: int | None) -> None:
    if expected is None:
        return
    found = sum(name.upper().endswith(".JPEG") for _, _, names in os.walk(folder) for name in names)
    if found != expected:
        raise RunError(
            f"{folder}: {found:,} pictures instead of {expected:,}; delete the folder and repeat the command"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minilora.commands.download", description="Fetch and unpack a public data set."
    )
    parser.add_argument("name", choices=sorted(SETS), help="the data set")
    parser.add_argument("directory", metavar="DIR", help="folder to unpack into; it is made if it is missing")
    parser.add_argument("--mirror", metavar="URL", help=f"base address of a mirror (default: ${MIRROR})")
    options = parser.parse_args(argv)

    def download(_: object) -> int:
        folder = fetch(options.name, options.directory, options.mirror)
        print(f"next: python train.py --recipe {SETS[options.name].recipe} --data-dir {folder}")
        return 0

    return cli.run(download, (UserError,))


if __name__ == "__main__":
    sys.exit(main())
