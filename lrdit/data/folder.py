"""Your own images: a folder of files, or the arrays of an .npz.

About one image in twenty is held out, by a hash of its path or index alone: a
file that comes or goes never moves another from one split to the other.

Axes: N examples, b examples asked for, H W image, C channels.
"""

import collections
import concurrent.futures
import hashlib
import logging
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from lrdit.data import images
from lrdit.data.source import DataOptions, DecodedImages, Source, describe_path
from lrdit.runtime.errors import UserError, system_limit
from lrdit.runtime.progress import make_bar

HELD_OUT_ONE_IN = 20
EVAL_FOLDERS = ("eval", "val", "valid", "validation", "test")
# Those of `images.FORMATS`.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
NAMED = 3  # a message names at most so many files
HOW_TO_MAKE_NPZ = "make it by np.savez(path, image=..., label=...)"
CHECKED_AT_ONCE = 256  # files in the threads' queue; an interrupt waits for no more
KIND_OF_MODE = {"1": "black and white", "L": "grey", "P": "palette", "RGB": "colour"}

log = logging.getLogger("lrdit")


class _Unreadable(UserError):
  """A file that cannot be read, with the reason."""

  def __init__(self, name: str, reason: str):
    super().__init__(
      f"{_printable(name)} cannot be read ({reason}): repair or remove it, or set "
      "config.data.skip_unreadable=True"
    )
    self.reason = reason


def _printable(name: str) -> str:
  """A file's name without what no terminal or log file could encode."""
  return name.encode("utf-8", "backslashreplace").decode()


def _name_some(names: Sequence[str]) -> str:
  more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
  return ", ".join(_printable(name) for name in names[:NAMED]) + more


def _given_path(options: DataOptions, name: str, what: str) -> str:
  if not options.data_dir:
    raise UserError(f"data.name={name} needs config.data.data_dir: give it {what}")
  return os.path.expanduser(options.data_dir)


def _choose(keys: Iterable[bytes], split: str, mend: str) -> Int[np.ndarray, " n"]:
  """Which examples are a split's.

  Args:
    keys: what each example is told by.
    split: "train" or "eval".
    mend: what to do about too few examples, for the error.

  Returns:
    (n,) indices in rising order.

  Raises:
    UserError: a split would be empty.
  """
  held_out = np.array([zlib.crc32(key) % HELD_OUT_ONE_IN == 0 for key in keys])
  if held_out.all() or not held_out.any():
    raise UserError(
      f"too few images to hold out about one in {HELD_OUT_ONE_IN} for evaluation (number of "
      f"images: {len(held_out)}): {mend}"
    )
  return np.flatnonzero(held_out == (split == "eval"))


def _conversion(image: Image.Image, num_channels: int) -> str:
  """What `images.fit` converts an image from, in words; "" if its pixels stay."""
  if image.has_transparency_data:
    return "with transparency"
  if image.mode == ("L" if num_channels == 1 else "RGB"):
    return ""
  if image.mode.startswith("I"):
    return "16-bit grey"
  return KIND_OF_MODE.get(image.mode, image.mode)


def _report(kinds: Sequence[str], sides: Int[np.ndarray, "N 2"], options: DataOptions) -> None:
  """Says what becomes of images that are not as the model takes them.

  Args:
    kinds: (N) answers of `_conversion`.
    sides: (N, 2) widths and heights in pixels.
    options: what they are brought to.
  """
  total, size = len(kinds), options.image_size
  converted = collections.Counter(kind for kind in kinds if kind)
  if converted:
    target = "grey" if options.num_channels == 1 else "RGB"
    named = ", ".join(f"{count} {kind}" for kind, count in converted.most_common())
    log.info("%d of %d images converted to %s: %s", converted.total(), total, target, named)
  oblong = np.count_nonzero(sides[:, 0] != sides[:, 1])
  if oblong:
    log.info("%d of %d images are not square: only the centre is used", oblong, total)
  small = np.count_nonzero(sides.min(axis=1) < size)
  if small:
    log.warning("%d of %d images are smaller than %d pixels and enlarged", small, total, size)


def _is_hidden(name: str) -> bool:
  return name.startswith(".")


def _walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
  """Files at any depth, links followed; of hidden folders, their names alone.

  Args:
    folder: where to look.
    prefix: the part of it to look in; "" or ending in "/".
    above: the real paths of the folders this one was reached through.

  Yields:
    paths relative to `folder`, with "/".
  """
  here = os.path.realpath(os.path.join(folder, prefix))
  if here in above:  # a link to a folder that it lies in
    return
  with os.scandir(here) as entries:
    for entry in entries:
      if entry.is_dir() and not _is_hidden(entry.name):
        yield from _walk(folder, f"{prefix}{entry.name}/", above | {here})
      else:
        yield prefix + entry.name


def _list_images(folder: str) -> list[str]:
  """The relative paths of a folder's images, sorted; warns of other files."""
  if not os.path.isdir(folder):
    found = f"is not a folder but {describe_path(folder)}"
    found = found if os.path.exists(folder) else "does not exist"
    raise UserError(f"config.data.data_dir={folder} {found}: give the folder of your images")
  found = sorted(_walk(folder, "", frozenset()))
  hidden = [path for path in found if _is_hidden(path.rpartition("/")[2])]
  files = sorted(set(found) - set(hidden))
  if hidden:
    log.info("left out: hidden files and folders (%d): %s", len(hidden), _name_some(hidden))
  paths = [path for path in files if path.lower().endswith(EXTENSIONS)]
  others = [path for path in files if not path.lower().endswith(EXTENSIONS)]
  if others:
    log.warning("left out: not images by their extension (%d): %s", len(others), _name_some(others))
  if not paths:
    raise UserError(
      f"config.data.data_dir={folder} holds no images (it is {describe_path(folder)}): they are "
      f"told by their extensions {', '.join(EXTENSIONS)}"
    )
  return paths


def _class_names(folder: str, paths: Sequence[str]) -> list[str]:
  """Return the sub-folders that images lie in, as `_class_order` sorts; none if they lie flat.

  Raises:
    UserError: images lie in sub-folders and also beside them.
  """
  flat = [path for path in paths if "/" not in path]
  nested = [path for path in paths if "/" in path]
  if flat and nested:
    raise UserError(
      f"{_printable(folder)} holds images both directly ({_printable(flat[0])}) and in sub-folders "
      f"({_printable(nested[0])}): move all of them into sub-folders, one for each class, or none"
    )
  names = {path.partition("/")[0] for path in nested}
  with os.scandir(folder) as entries:
    for entry in sorted(entries, key=lambda entry: entry.name):
      if entry.is_dir() and entry.name not in names and not _is_hidden(entry.name):
        log.warning("left out: the sub-folder %s has no images", _printable(entry.path))
  return sorted(names, key=_class_order)


def _class_order(name: str) -> tuple[int, int, str]:
  """Sort whole numbers by their value, before all other names: 2 stands before 10."""
  is_number = name.isascii() and name.isdecimal()
  return (0, int(name), name) if is_number else (1, 0, name)


def _split_folders(folder: str, paths: Sequence[str]) -> dict[str, str]:
  """The sub-folders that are the splits, by split; {} if the folder is not made so.

  Raises:
    UserError: its sub-folders are called like splits, but are not one of each.
  """
  tops = sorted({path.partition("/")[0] for path in paths})
  train = [top for top in tops if top.lower() == "train"]
  held_out = [top for top in tops if top.lower() in EVAL_FOLDERS]
  if len(train) + len(held_out) < len(tops):
    return {}
  if len(train) != 1 or len(held_out) != 1:
    raise UserError(
      f"the sub-folders of {folder} ({', '.join(tops)}) are called like splits, not like classes: "
      f"keep train and one of {', '.join(EVAL_FOLDERS)}, or give one of them as "
      "config.data.data_dir"
    )
  return {"train": train[0], "eval": held_out[0]}


def _layout(folder: str, split: str) -> tuple[str, list[str], list[str]]:
  """Finds a split's images.

  Returns:
    the folder that is the split, "" or ending in "/"; the paths of its images,
    relative to `folder`; the names of the classes.

  Raises:
    UserError: `folder` is not laid out as `load_folder` says.
  """
  paths = _list_images(folder)
  folders = _split_folders(folder, paths)
  if not folders:
    names = _class_names(folder, paths)
    mend = "add images, or sort them into the sub-folders train and eval"
    chosen = _choose(map(os.fsencode, paths), split, mend)
    return "", [paths[i] for i in chosen], names
  classes = {}
  for each, name in folders.items():
    below = [path.removeprefix(f"{name}/") for path in paths if path.startswith(f"{name}/")]
    classes[each] = _class_names(os.path.join(folder, name), below)
  unknown = sorted(set(classes["eval"]) - set(classes["train"]))
  if unknown or bool(classes["eval"]) != bool(classes["train"]):
    raise UserError(
      f"{folder}: the sub-folders of {folders['eval']} must be classes of {folders['train']}; "
      f"{_name_some(unknown) or 'it has no sub-folders'}: move or rename what differs"
    )
  prefix = f"{folders[split]}/"
  return prefix, [path for path in paths if path.startswith(prefix)], classes["train"]


def _decode_file(path: pathlib.Path) -> Image.Image:
  """A file's image, turned as its camera was held.

  Raises:
    UnreadableImage: for a reason that does not name the file.
  """
  try:
    # Whole, as an image that fails to decode would keep its file open.
    content = path.read_bytes()
  except OSError as error:
    if system_limit(error) is not None:
      raise
    raise images.UnreadableImage(error.strerror) from error
  if not content:
    raise images.UnreadableImage("an empty file")
  try:
    image = images.decode(content)
  except images.UnreadableImage as error:
    if isinstance(error.__cause__, UnidentifiedImageError):  # it speaks of an address in memory
      raise images.UnreadableImage("no image of a known format") from error
    raise
  try:
    ImageOps.exif_transpose(image, in_place=True)
  except Exception as error:  # whatever the bytes lead their reader to
    raise images.UnreadableImage(f"its EXIF data are damaged: {error}") from error
  return image


def _digest(folder: str, names: Sequence[str]) -> str:
  """Tells the paths and sizes of some files from any others."""
  digest = hashlib.sha256()
  for name in names:
    size = os.path.getsize(os.path.join(folder, name))
    digest.update(os.fsencode(name) + b"\0%d\n" % size)
  return digest.hexdigest()[:16]


class _Files:
  """The files of a split: images to decode, and what they were before."""

  def __init__(self, folder: str, names: Sequence[str], options: DataOptions):
    self.names = names
    self.kinds = [""] * len(names)
    self.sides = np.zeros((len(names), 2), np.int32)
    self._folder, self._options = folder, options

  def decode(self, index: Int[np.ndarray, " b"]) -> list[UInt8[np.ndarray, "H W C"]]:
    """The images, cropped and resized: b arrays (H, W, C).

    Raises:
      _Unreadable: a file is no image or damaged.
    """
    return [self._decode_one(i) for i in index.tolist()]

  def _decode_one(self, i: int) -> UInt8[np.ndarray, "H W C"]:
    try:
      image = _decode_file(pathlib.Path(self._folder, self.names[i]))
    except images.UnreadableImage as error:
      raise _Unreadable(self.names[i], str(error)) from error
    self.kinds[i] = _conversion(image, self._options.num_channels)
    self.sides[i] = image.size
    return images.fit(image, 0, self._options.image_size, self._options.num_channels)


def _find_unreadable(rows: DecodedImages) -> dict[int, str]:
  """Why images cannot be read, by their index.

  Every image is decoded here, so that a damaged one is found before a run and
  not within; `rows` keeps what it has room for.
  """
  reasons, total = {}, rows.shape[0]

  def check(i: int) -> None:
    try:
      rows[np.array([i])]
    except _Unreadable as error:
      reasons[i] = error.reason

  with concurrent.futures.ThreadPoolExecutor() as pool, make_bar(total, 0, "image") as bar:
    for start in range(0, total, CHECKED_AT_ONCE):
      for _ in pool.map(check, range(start, min(start + CHECKED_AT_ONCE, total))):
        bar.update()
  return dict(sorted(reasons.items()))


def _leave_out(problems: Sequence[str], total: int, options: DataOptions) -> None:
  """Tells of unreadable images, and refuses them unless they may be left out."""
  for problem in problems:  # all of them, where the error names some
    log.warning("cannot be read: %s", _printable(problem))
  if problems and not options.skip_unreadable:
    raise UserError(
      f"{len(problems)} of {total} images cannot be read: {_name_some(problems)}: repair or "
      "remove them, or set config.data.skip_unreadable=True"
    )
  if len(problems) == total:
    raise UserError(f"none of the {total} images can be read: repair them")
  if problems:
    log.warning("left out: %d of %d images that cannot be read", len(problems), total)


def _describe(split: str, classes: Sequence[str], options: DataOptions) -> dict[str, Any]:
  """What a folder's fingerprint says besides its files."""
  fingerprint = {"name": "folder", "split": split, "crop": images.crop_name(0, options.image_size)}
  return fingerprint | ({"classes": [_printable(name) for name in classes]} if classes else {})


def fingerprint_folder(split: str, options: DataOptions) -> dict[str, Any]:
  """The fingerprint of `load_folder`'s source, as far as it is known without decoding.

  Where unreadable files may be left out, that is not which files are used.
  """
  folder = _given_path(options, "folder", "the folder of your images")
  _, names, classes = _layout(folder, split)
  fingerprint = _describe(split, classes, options)
  if options.skip_unreadable:
    return fingerprint
  return fingerprint | {"digest": _digest(folder, names), "num_examples": len(names)}


def load_folder(split: str, options: DataOptions) -> Source:
  """A folder of image files.

  Either all images lie directly in it (no classes), or all lie in sub-folders,
  at any depth: each sub-folder is a class, numbered in the order of names, whole numbers in
  that of their values. The splits are its
  sub-folders `train` and one of `EVAL_FOLDERS`, each made in that way, if it has
  those and no others; otherwise about one image in twenty is held out. Of an
  animation the first frame is taken. Every image is decoded once here.

  Args:
    split: "train" or "eval".
    options: `data_dir` is the folder.

  Returns:
    uint8 images, centre-cropped and resized.

  Raises:
    UserError: there is no such folder, it is laid out otherwise, or images
      cannot be read and `skip_unreadable` is not set.
  """
  folder = _given_path(options, "folder", "the folder of your images")
  prefix, names, classes = _layout(folder, split)
  total, size = len(names), options.image_size
  files = _Files(folder, names, options)
  rows = DecodedImages(files.decode, (total, size, size, options.num_channels), options.cache_bytes)
  reasons = _find_unreadable(rows)
  _leave_out([f"{names[i]} ({reason})" for i, reason in reasons.items()], total, options)
  keep = np.array([i for i in range(total) if i not in reasons])
  _report([files.kinds[i] for i in keep], files.sides[keep], options)
  labels = np.zeros(total, np.int32)
  if classes:
    number = {name: i for i, name in enumerate(classes)}
    tops = [name.removeprefix(prefix).partition("/")[0] for name in names]
    labels = np.array([number[top] for top in tops], np.int32)
  source = Source(rows, labels, len(classes), _describe(split, classes, options))
  return source.subset(keep, digest=_digest(folder, [names[i] for i in keep]))


def _check_is_npz(path: str) -> None:
  if not os.path.isfile(path):
    raise UserError(
      f"config.data.data_dir={path} is not a file: give the .npz of your images (there is "
      f"{describe_path(path)})"
    )
  if not zipfile.is_zipfile(path):
    raise UserError(
      f"{path} is not an .npz, or is cut short (it is {describe_path(path)}): {HOW_TO_MAKE_NPZ}"
    )


def _read_npz(path: str) -> dict[str, np.ndarray]:
  """The arrays `image` and, if there is one, `label`; warns of others."""
  _check_is_npz(path)
  try:
    # Never unpickled: that would run whatever the file asks for.
    with np.load(path, allow_pickle=False) as file:
      wanted = [name for name in ("image", "label") if name in file.files]
      _check_names(path, file.files)
      return {name: np.asarray(file[name]) for name in wanted}
  # RuntimeError: compressions and encryptions that zipfile does not know.
  except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(
      f"{path} is damaged, or its arrays are not plain numbers ({error}): {HOW_TO_MAKE_NPZ}"
    ) from error


def _check_names(path: str, names: Sequence[str]) -> None:
  """Refuses a file without `image`; warns of arrays that nothing reads."""
  if "image" not in names:
    rename = "; arr_0 was saved without a name: rename it" if "arr_0" in names else ""
    raise UserError(
      f"{path} has no array image, only {_name_some(names)}{rename}: {HOW_TO_MAKE_NPZ}"
    )
  unused = sorted(set(names) - {"image", "label"})
  if unused:
    log.warning("left out: arrays of %s besides image and label: %s", path, _name_some(unused))


def _checked_images(path: str, image: np.ndarray) -> UInt8[np.ndarray, "N H W C"]:
  """The array `image`, with an axis for the channels."""
  if image.dtype != np.uint8:
    raise UserError(f"image in {path} is {image.dtype}: it must be uint8 in [0, 255]")
  shape = image.shape if image.ndim == 4 else (*image.shape, 1)
  if len(shape) != 4 or shape[3] not in (1, 3, 4) or 0 in shape:
    raise UserError(
      f"image in {path} is of shape {image.shape}: it must be (N, H, W), or (N, H, W, C) with 1, 3 "
      "or 4 channels, and not empty"
    )
  return image.reshape(shape)


def _checked_labels(path: str, label: np.ndarray, total: int) -> Int32[np.ndarray, " N"]:
  """The array `label`."""
  if label.shape != (total,):
    raise UserError(
      f"label in {path} is of shape {label.shape}: it must be ({total},), one for each image"
    )
  if label.dtype.kind not in "iu":
    raise UserError(f"label in {path} is {label.dtype}: it must be integers")
  if label.min() < 0 or label.max() >= np.iinfo(np.int32).max:
    raise UserError(
      f"label in {path} runs from {label.min()} to {label.max()}: number the classes from 0"
    )
  return label.astype(np.int32)


def _fitted(scans: UInt8[np.ndarray, "N H W C"], options: DataOptions) -> DecodedImages:
  """Images of another size or kind, brought to the model's as they are asked for."""
  size, num_channels = options.image_size, options.num_channels
  scans = scans[..., 0] if scans.shape[-1] == 1 else scans
  sides = np.broadcast_to([scans.shape[2], scans.shape[1]], (len(scans), 2))
  _report([_conversion(Image.fromarray(scans[0]), num_channels)] * len(scans), sides, options)

  def decode(index: Int[np.ndarray, " b"]) -> list[UInt8[np.ndarray, "size size C"]]:
    return [images.fit(Image.fromarray(scans[i]), 0, size, num_channels) for i in index]

  return DecodedImages(decode, (len(scans), size, size, num_channels), options.cache_bytes)


def fingerprint_npz(split: str, options: DataOptions) -> dict[str, Any]:
  """The fingerprint of `load_npz`'s source, but for the number of its examples."""
  path = _given_path(options, "npz", "the .npz file of your images")
  _check_is_npz(path)
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  crop = images.crop_name(0, options.image_size)
  return {"name": "npz", "split": split, "crop": crop, "digest": digest[:16]}


def load_npz(split: str, options: DataOptions) -> Source:
  """The arrays of an .npz; the split is held in memory, the whole file while it is opened.

  `image` is (N, H, W) or (N, H, W, C) uint8 in [0, 255], grey, RGB or RGBA, and
  `label`, if there is one, (N,) integers in [0, K). About one image in twenty is
  held out.

  Args:
    split: "train" or "eval".
    options: `data_dir` is the file.

  Returns:
    uint8 images, centre-cropped and resized.

  Raises:
    UserError: there is no such file, or its arrays are of another kind.
  """
  path = _given_path(options, "npz", "the .npz file of your images")
  arrays = _read_npz(path)
  scans = _checked_images(path, arrays["image"])
  labels, num_classes = np.zeros(len(scans), np.int32), 0
  if "label" in arrays:
    labels = _checked_labels(path, arrays["label"], len(scans))
    num_classes = int(labels.max()) + 1
  keys = (str(i).encode() for i in range(len(scans)))
  chosen = _choose(keys, split, "add images")
  rows, size = scans[chosen], options.image_size
  fingerprint = fingerprint_npz(split, options) | {"num_examples": len(chosen)}
  if rows.shape[1:] != (size, size, options.num_channels):
    rows = _fitted(rows, options)
  return Source(rows, labels[chosen], num_classes, fingerprint)
