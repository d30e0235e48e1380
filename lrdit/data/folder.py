"""Your own images in a folder of files.

Either all images lie directly in the folder (no classes), or all lie in sub-folders, at any
depth, and each sub-folder is a class. Classes are numbered in the order of their names, whole
numbers by value. If the only sub-folders are `train` and one of `EVAL_FOLDERS`, they are the
splits, each laid out in the same way; otherwise about one image in twenty is held out, by a hash
of its path.
"""

import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from lrdit.data import images
from lrdit.data import source as sources
from lrdit.data.source import DataOptions, DecodedImages, Source
from lrdit.runtime.errors import UserError, system_limit
from lrdit.runtime.progress import make_bar
from lrdit.runtime.text import name_some, printable

EVAL_FOLDERS = ("eval", "val", "valid", "validation", "test")
# The extensions of `images.FORMATS`.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FIX_UNREADABLE = "repair or remove what is named, or set config.data.skip_unreadable=True"

log = logging.getLogger("lrdit")


def fingerprint_folder(split: str, options: DataOptions) -> dict[str, Any]:
  """Return what is known of the fingerprint of `load_folder`'s source without decoding.

  It leaves out the files if unreadable ones may be skipped.
  """
  folder = _folder(options)
  _, names, classes = _find_split(folder, split)
  fingerprint = _fingerprint(split, options, folder, names, classes)
  unknown = ("digest", "num_examples") if options.skip_unreadable else ()
  return {key: value for key, value in fingerprint.items() if key not in unknown}


def load_folder(split: str, options: DataOptions) -> Source:
  """Open a folder of image files, and decode each of the split's images once.

  Images are center-cropped and resized to uint8; an animation gives its first frame.

  Raises:
    UserError: the folder is missing or laid out otherwise, or images cannot be read and
      `skip_unreadable` is not set.
  """
  folder = _folder(options)
  prefix, names, classes = _find_split(folder, split)
  total, size = len(names), options.image_size
  files = _Files(folder, names, options)
  rows = DecodedImages(files.decode, (total, size, size, options.num_channels), options.cache_bytes)
  keep = _find_readable(rows, names, options)
  kinds = [files.kinds[i] for i in keep]
  images.report_conversions(kinds, files.sides[keep], size, options.num_channels)
  number = {name: i for i, name in enumerate(classes)}
  tops = [name.removeprefix(prefix).partition("/")[0] for name in names]
  labels = np.array([number[top] if classes else 0 for top in tops], np.int32)
  fingerprint = _fingerprint(split, options, folder, [names[i] for i in keep], classes)
  return Source(rows, labels, len(classes), fingerprint).subset(keep)


def _folder(options: DataOptions) -> str:
  return sources.own_path(options, "folder", os.path.isdir, "the folder of your images")


def _fingerprint(
  split: str, options: DataOptions, folder: str, names: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
  digest = hashlib.sha256()
  for name in names:
    size = os.path.getsize(os.path.join(folder, name))
    digest.update(os.fsencode(name) + b"\0%d\n" % size)
  return {
    "name": "folder",
    "split": split,
    "crop": images.crop_name(0, options.image_size),
    "digest": digest.hexdigest()[:16],
    "num_examples": len(names),
  } | ({"classes": [printable(name) for name in classes]} if classes else {})


def _find_split(folder: str, split: str) -> tuple[str, list[str], list[str]]:
  """Return a split's sub-folder with "/" ("" without splits), relative image paths and classes."""
  paths = _list_images(folder)
  folders = _split_folders(folder, paths)
  if not folders:
    classes = _class_names(folder, paths)
    fix = "add images, or sort them into the sub-folders train and eval"
    chosen = sources.choose_split(map(os.fsencode, paths), split, fix)
    return "", [paths[i] for i in chosen], classes
  names, classes = {}, {}
  for each, top in folders.items():
    names[each] = [path for path in paths if path.startswith(f"{top}/")]
    below = [name.removeprefix(f"{top}/") for name in names[each]]
    classes[each] = _class_names(os.path.join(folder, top), below)
  unknown = sorted(set(classes["eval"]) - set(classes["train"]))
  if unknown or bool(classes["eval"]) != bool(classes["train"]):
    raise UserError(
      f"{folder}: the sub-folders of {folders['eval']} must be classes of {folders['train']}; "
      f"{name_some(unknown) or 'it has no sub-folders'}: move or rename what differs"
    )
  return f"{folders[split]}/", names[split], classes["train"]


def _list_images(folder: str) -> list[str]:
  """Return the sorted relative paths of a folder's images, and warn of other files."""
  found = sorted(_walk(folder, "", frozenset()))
  hidden = [path for path in found if path.rpartition("/")[2].startswith(".")]
  files = sorted(set(found) - set(hidden))
  if hidden:
    log.info("left out: hidden files and folders (%d): %s", len(hidden), name_some(hidden))
  paths = [path for path in files if path.lower().endswith(EXTENSIONS)]
  others = sorted(set(files) - set(paths))
  if others:
    log.warning("left out: not images by their extension (%d): %s", len(others), name_some(others))
  if not paths:
    raise UserError(
      f"config.data.data_dir={folder} holds no images (it is {sources.describe_path(folder)}): an "
      f"image has one of the extensions {', '.join(EXTENSIONS)}"
    )
  return paths


def _walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
  """Yield the relative paths of files at any depth, and of hidden folders without their files.

  Links are followed; `above` holds the real paths of the folders that lead to `prefix`.
  """
  here = os.path.realpath(os.path.join(folder, prefix))
  if here in above:  # A link leads back up.
    return
  with os.scandir(here) as entries:
    for entry in entries:
      if entry.is_dir() and not entry.name.startswith("."):
        yield from _walk(folder, f"{prefix}{entry.name}/", above | {here})
      else:
        yield prefix + entry.name


def _split_folders(folder: str, paths: Sequence[str]) -> dict[str, str]:
  """Return the sub-folder of each split, or {} if the folder is not divided into splits."""
  tops = sorted({path.partition("/")[0] for path in paths})
  train = [top for top in tops if top.lower() == "train"]
  held_out = [top for top in tops if top.lower() in EVAL_FOLDERS]
  if len(train) + len(held_out) < len(tops):
    return {}
  if len(train) != 1 or len(held_out) != 1:
    raise UserError(
      f"the sub-folders of {folder} ({', '.join(tops)}) have names of splits, not of classes: "
      f"keep train and one of {', '.join(EVAL_FOLDERS)}, or set config.data.data_dir to one of them"
    )
  return {"train": train[0], "eval": held_out[0]}


def _class_names(folder: str, paths: Sequence[str]) -> list[str]:
  """Return the sub-folders that hold images, in order, or [] if the images lie flat."""
  flat = [path for path in paths if "/" not in path]
  nested = [path for path in paths if "/" in path]
  if flat and nested:
    raise UserError(
      f"{printable(folder)} holds images both directly ({printable(flat[0])}) and in sub-folders "
      f"({printable(nested[0])}): move all of them into sub-folders, one for each class, or none"
    )
  names = {path.partition("/")[0] for path in nested}
  with os.scandir(folder) as entries:
    for entry in sorted(entries, key=lambda entry: entry.name):
      if entry.is_dir() and entry.name not in names and not entry.name.startswith("."):
        log.warning("left out: the sub-folder %s has no images", printable(entry.path))
  return sorted(names, key=_class_order)


def _class_order(name: str) -> tuple[int, int, str]:
  """Return a key that sorts whole numbers by value, before all other names."""
  is_number = name.isascii() and name.isdecimal()
  return (0, int(name), name) if is_number else (1, 0, name)


class _Files:
  """A split's files: their images, and each one's `images.conversion` and size."""

  def __init__(self, folder: str, names: Sequence[str], options: DataOptions):
    self.kinds = [""] * len(names)
    self.sides = np.zeros((len(names), 2), np.int32)
    self._folder, self._names, self._options = folder, names, options

  def decode(self, index: Int[np.ndarray, " b"]) -> list[UInt8[np.ndarray, "H W C"]]:
    """Return the cropped and resized images; raise UserError from an UnreadableImage."""
    size, num_channels = self._options.image_size, self._options.num_channels
    decoded = []
    for i in index.tolist():
      try:
        image = _decode_file(pathlib.Path(self._folder, self._names[i]))
      except images.UnreadableImage as error:
        name = printable(self._names[i])
        raise UserError(f"{name} cannot be read ({error}): {FIX_UNREADABLE}") from error
      self.kinds[i] = images.conversion(image, num_channels)
      self.sides[i] = image.size
      decoded.append(images.fit(image, 0, size, num_channels))
    return decoded


def _decode_file(path: pathlib.Path) -> Image.Image:
  """Return a file's upright image; raise UnreadableImage, which does not name the file."""
  try:
    content = path.read_bytes()  # PIL would keep the file of an undecodable image open.
  except OSError as error:
    if system_limit(error) is not None:
      raise
    raise images.UnreadableImage(error.strerror) from error
  if not content:
    raise images.UnreadableImage("an empty file")
  try:
    image = images.decode(content)
  except images.UnreadableImage as error:
    if isinstance(error.__cause__, UnidentifiedImageError):  # Its text is an address in memory.
      raise images.UnreadableImage("no image of a known format") from error
    raise
  try:
    ImageOps.exif_transpose(image, in_place=True)
  except Exception as error:  # PIL does not document what its reader raises.
    raise images.UnreadableImage(f"its EXIF data are damaged: {error}") from error
  return image


def _find_readable(
  rows: DecodedImages, names: Sequence[str], options: DataOptions
) -> Int[np.ndarray, " n"]:
  """Decode every image before the run starts, and return the indices of the readable ones."""
  reasons, total = {}, len(names)

  def check(i: int) -> None:
    try:
      rows[np.array([i])]
    except UserError as error:
      reasons[i] = str(error.__cause__)

  with make_bar(total, 0, "image") as bar:
    for _ in sources.read_ahead(check, range(total)):
      bar.update()
  problems = [f"{names[i]} ({reasons[i]})" for i in sorted(reasons)]
  for problem in problems:  # The error names only three.
    log.warning("cannot be read: %s", printable(problem))
  if problems and not options.skip_unreadable:
    raise UserError(
      f"{len(problems)} of {total} images cannot be read: {name_some(problems)}: {FIX_UNREADABLE}"
    )
  if len(problems) == total:
    raise UserError(f"none of the {total} images can be read: repair them")
  if problems:
    log.warning("left out: %d of %d images that cannot be read", len(problems), total)
  return np.array([i for i in range(total) if i not in reasons])
