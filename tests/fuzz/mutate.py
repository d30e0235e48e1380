"""Damaged and hostile variants of a file: of its bytes, and of the structure that it has.

A variant of a structure has right lengths and checksums, so that it gets past the first checks.
"""

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator

MAX_CHANGES = 3
# A file and a directory with valid files, outside the one that is read; hostile names point there.
BAIT, BAITS = "bait", "baits"
DEEP = "@DEEP@"  # stands for brackets too deep for any encoder
TEXTS = (
  "../" + BAIT,
  "../../" + BAIT,
  "../../" + BAITS,
  "/etc/passwd",
  "..",
  ".",
  "",
  "/",
  "\0",
  "a\0b",
  "\ud800",
)
TEXTS += (
  "x" * 5000,
  "\x1b[31m",
  "two\nlines",
  "<script>alert(1)</script>",
  "nan",
  "1",
  "%s{0}",
  "é",
)
NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**19, 10**400)
NUMBERS += (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))
OTHERS = (None, True, False, [], {}, [[]], [0], [None], {"": 0}, [{}], DEEP, "0", [1, [2, [3]]])
CHUNK_BYTES = 12  # of a PNG's chunk around its data: length, name, checksum
RECORD_BYTES = 16  # of a TFRecord around its data: length, its checksum, the data's checksum


def pick(rng: Rng, choices: Any) -> Any:
  """Return one of a sequence, by itself."""
  return copy.deepcopy(choices[int(rng.integers(len(choices)))])


def mutate_bytes(rng: Rng, data: bytes) -> bytes:
  """Cut, flip, overwrite, insert, repeat or remove bytes."""
  if not data:
    return rng.bytes(int(rng.integers(1, 64)))
  start = int(rng.integers(len(data)))
  length = int(min(len(data) - start, rng.integers(1, 65)))
  end = start + length
  match int(rng.integers(8)):
    case 0:
      return data[:start]
    case 1:
      return data[:start] + bytes([data[start] ^ (1 << int(rng.integers(8)))]) + data[start + 1 :]
    case 2:
      return data[:start] + rng.bytes(length) + data[end:]
    case 3:
      return data[:start] + rng.bytes(length) + data[start:]
    case 4:
      return data[:end] + data[start:]
    case 5:
      return data[:start] + data[end:]
    case 6:  # a length or an offset
      kind, value = pick(rng, ("<I", ">I", "<Q", ">Q", "<H")), pick(rng, NUMBERS[:13])
      size = struct.calcsize(kind)
      number = (value % (1 << (8 * size))).to_bytes(size, "little" if kind[0] == "<" else "big")
      return data[:start] + number + data[start + size :]
  byte = pick(rng, (b"\0", b"\xff", b" ", b"9", b"-", b"}", b'"', b"/"))
  return data[:start] + byte * length + data[end:]


def _places(value: Any) -> list[tuple[Any, Any]]:
  """Return every (container, key or index) of a JSON value."""
  found, stack = [], [value]
  while stack:
    each = stack.pop()
    if isinstance(each, dict | list):
      keys = list(each) if isinstance(each, dict) else range(len(each))
      found += [(each, key) for key in keys]
      stack += [each[key] for key in keys]
  return found


def _hostile(rng: Rng, value: Any) -> Any:
  """Return another value in the place of a JSON value."""
  match int(rng.integers(7)):
    case 0:
      return pick(rng, TEXTS)
    case 1:
      return pick(rng, NUMBERS)
    case 2:
      return pick(rng, OTHERS)
    case 3:
      return pick(rng, ([value], {"a": value}, str(value)[:100], [value, value]))
  if isinstance(value, bool) or not isinstance(value, int | float):
    return pick(rng, TEXTS) if isinstance(value, str) else pick(rng, OTHERS)
  return pick(rng, (-value, value + 1, value - 1, value * 10**9, float(value), value // 2))


def mutate_value(rng: Rng, value: Any) -> Any:
  """Change a JSON value in a few places: values, types, names, missing and surplus entries."""
  value = json.loads(json.dumps(value))
  for _ in range(int(rng.integers(1, MAX_CHANGES + 1))):
    places = _places(value)
    if not places or rng.random() < 0.02:
      return pick(rng, OTHERS)
    container, key = places[int(rng.integers(len(places)))]
    match int(rng.integers(8)):
      case 0:
        del container[key]
      case 1 if isinstance(container, dict):
        container[pick(rng, TEXTS)] = container.pop(key)
      case 1 | 2 if isinstance(container, list):
        container.insert(key, container[key])
      case 2:
        container[pick(rng, TEXTS)] = container[key]
      case 3:
        other, place = places[int(rng.integers(len(places)))]
        if isinstance(other, dict) == isinstance(container, dict) and place in list(_keys(other)):
          # A copy: a container in itself could not be written.
          copies = (json.loads(json.dumps(v)) for v in (container[key], other[place]))
          other[place], container[key] = copies
      case _:
        container[key] = _hostile(rng, container[key])
  return value


def _keys(container: Any) -> Any:
  return container if isinstance(container, dict) else range(len(container))


def dump(rng: Rng, value: Any, **options: Any) -> bytes:
  """Write JSON as it may come from elsewhere."""
  depth = pick(rng, (50, 900, 100_000))
  deep = pick(rng, ("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth))
  return json.dumps(value, **options).replace(f'"{DEEP}"', deep).encode()


def mutate_json(rng: Rng, data: bytes) -> bytes:
  """Change the value of a JSON file, or of one line of several."""
  lines = data.splitlines(keepends=True)
  if data.lstrip()[:1] in (b"{", b"[") and (len(lines) == 1 or not lines[0].rstrip()[1:]):
    return dump(rng, mutate_value(rng, json.loads(data)))
  number = int(rng.integers(len(lines)))
  lines[number] = dump(rng, mutate_value(rng, json.loads(lines[number]))) + b"\n"
  return b"".join(lines)


def mutate_manifest(rng: Rng, data: bytes) -> bytes:
  """Change a checkpoint's manifest, and give it the checksum of what it says."""
  contents = mutate_value(rng, json.loads(data)["contents"])
  crc32 = zlib.crc32(json.dumps(contents, sort_keys=True).encode())
  return json.dumps({"contents": contents, "crc32": crc32}).encode()


def mutate_safetensors(rng: Rng, data: bytes) -> bytes:
  """Change the header of a safetensors file."""
  size = int.from_bytes(data[:8], "little")
  header = dump(rng, mutate_value(rng, json.loads(data[8 : 8 + size])))
  return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate_npy(rng: Rng, data: bytes) -> bytes:
  """Change the header of an .npy file, whose text has the length that it says."""
  size = struct.unpack("<H", data[8:10])[0]
  text, rest = data[10 : 10 + size].rstrip().decode("latin1"), data[10 + size :]
  number, kind = pick(rng, NUMBERS), pick(rng, ("|O", "<f8", "<U9999999", "|V0", "|S1", "<i8", "?"))
  shape = pick(rng, ((), (0,), (number,), (number, number), (2**32, 2**32), (1,) * 70, (-1, 4)))
  fields = {"descr": kind, "fortran_order": pick(rng, (True, 0)), "shape": shape}
  name = pick(rng, list(fields))
  try:
    header = dict(eval(text, {"__builtins__": {}}))  # of our own writer
    header[name] = fields[name]
    text = repr(header)
  except SyntaxError:
    pass
  if rng.random() < 0.3:
    text = mutate_bytes(rng, text.encode("latin1")).decode("latin1")
  encoded = (text.encode("latin1") + b"\n")[:60000]
  version = data[6:8] if rng.random() < 0.9 else rng.bytes(2)
  return data[:6] + version + struct.pack("<H", len(encoded)) + encoded + rest


def mutate_npz(rng: Rng, data: bytes) -> bytes:
  """Change a member of an archive, with its checksum; or its name; or leave it out."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = [(name, archive.read(name)) for name in archive.namelist()]
  number, buffer = int(rng.integers(len(members))), io.BytesIO()
  name, content = members[number]
  match int(rng.integers(8)):
    case 0:
      del members[number]
    case 1:
      members[number] = pick(rng, (*TEXTS[:8], "image", "x.npy")), content
    case 2:
      members.insert(number, members[number])
    case 3:
      members[number] = name, mutate_bytes(rng, content)
    case 4:
      members[number] = name, members[int(rng.integers(len(members)))][1]
    case _:
      members[number] = name, mutate_npy(rng, content) if content[:6] == b"\x93NUMPY" else b""
  method = pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
  with zipfile.ZipFile(buffer, "w", method) as archive:
    for name, content in members:
      archive.writestr(zipfile.ZipInfo(name or "x"), content, method)
  return buffer.getvalue()


def mutate_png(rng: Rng, data: bytes) -> bytes:
  """Change a chunk of a PNG, with its length and checksum; repeat it, or leave it out."""
  chunks, place = [], 8
  while place + CHUNK_BYTES <= len(data):
    (length,) = struct.unpack(">I", data[place : place + 4])
    chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
    place += CHUNK_BYTES + length
  number = int(rng.integers(len(chunks)))
  name, content = chunks[number]
  match int(rng.integers(5)):
    case 0:
      del chunks[number]
    case 1:
      chunks.insert(number, chunks[number])
    case 2:
      kind = pick(rng, (b"PLTE", b"tRNS", b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"acTL", b"IHDR"))
      chunks.insert(number, (kind, rng.bytes(int(rng.integers(40)))))
    case _:
      chunks[number] = name, mutate_bytes(rng, content)
  packed = b""
  for name, content in chunks:
    crc32 = zlib.crc32(name + content)
    packed += struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc32)
  return data[:8] + packed


def mutate_tfrecord(rng: Rng, data: bytes) -> bytes:
  """Change a record of a TFRecord file, with its length, or the length alone."""
  records, place = [], 0
  while place + RECORD_BYTES <= len(data):
    (length,) = struct.unpack("<Q", data[place : place + 8])
    records.append(data[place + 12 : place + 12 + length])
    place += RECORD_BYTES + length
  number, buffer = int(rng.integers(len(records))), b""
  changed, wrong = mutate_bytes(rng, records[number]), rng.random() < 0.2
  for i, record in enumerate(records):
    record = changed if i == number else record
    length = pick(rng, NUMBERS[:13]) % 2**64 if wrong and i == number else len(record)
    buffer += struct.pack("<Q", length) + bytes(4) + record + bytes(4)
  return buffer


def _structure(name: str, data: bytes) -> Callable[[Rng, bytes], bytes]:
  """Return the mutator of a file's structure, judged by its name and first bytes."""
  if data[:2] == b"PK":
    return mutate_npz
  if data[:6] == b"\x93NUMPY":
    return mutate_npy
  if data[:4] == b"\x89PNG":
    return mutate_png
  if name.endswith(".safetensors"):
    return mutate_safetensors
  if ".tfrecord" in name:
    return mutate_tfrecord
  if data.startswith(b'{"contents"'):
    return mutate_manifest
  try:
    json.loads(data.splitlines()[0] if name.endswith("jsonl") else data)
  except (ValueError, IndexError):
    return mutate_bytes
  return mutate_json


def mutate(rng: Rng, name: str, data: bytes) -> bytes:
  """Return a variant of a file's bytes: one time in three of bytes, and else of the structure."""
  is_plain = rng.random() < 1 / 3
  change = mutate_bytes if is_plain else _structure(name, data)
  return change(rng, data)
