# SPDX-License-Identifier: Apache-2.0
"""The folder a conversion writes: nothing in it looks finished before it is.

All is made in a folder of its own inside, and moved out when every byte is there; config.json,
which a loader asks for first, comes last. A journal says which pieces are on disk, so that a
conversion that was stopped, killed or cut off from power goes on where it was.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from torch import Tensor

from vllm_plugin_tm.quantization.convert.checkpoint import CONFIG, INDEX
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.plan import Plan, Shard
from vllm_plugin_tm.quantization.convert.safetensors_file import make_header, write_at

WORK = ".tm-convert"
"""The folder inside the destination in which everything is made."""

_RECIPE, _JOURNAL, _LOCK = "recipe.json", "journal.json", "lock"
_SYNC_SECONDS = 5.0  # between two entries of the journal; what a cut of power may cost
# Weights in any form, and what describes them: not copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")


class Destination:
    """The output of one conversion, open for writing by any number of threads."""

    def __init__(self, folder: Path, recipe: dict, *, resume: bool) -> None:
        """Takes the folder.

        `recipe` is what the result depends on; a conversion goes on only by the same. `done` is
        then the set of pieces that are on disk.

        Raises ConvertError for a folder that has other things in it, an unfinished conversion
        without `resume` or by another recipe, one that runs at the moment, and a folder that cannot
        be made.
        """
        self.folder, self._work = folder, folder / WORK
        self._descriptors: dict[str, int] = {}
        self._lock: list[int] = []
        self.resumed = self._take(resume)
        try:
            with translated(folder, "cannot be written"):
                self._work.mkdir(parents=True, exist_ok=True)
                lock = os.open(self._work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                self._lock.append(lock)
            self._lock_it()
            self.recipe = self._settle(recipe)
        except ConvertError:
            self.discard(only_if_fresh=True)
            raise
        self._begins: dict[str, tuple[str, int]] = {}
        self._written: set[int] = set()
        self._journaled = self._read_journal()
        self._mutex, self._syncing = Lock(), Lock()
        self._synced = time.monotonic()

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the pieces that were on disk when the folder was taken."""
        return frozenset(self._journaled)

    def create(self, shards: tuple[Shard, ...]) -> None:
        """Makes the files at their full size, so that a disk without room says so before any work.

        Raises ConvertError with the bytes needed and the bytes free.
        """
        total = sum(shard.nbytes for shard in shards)
        for shard in shards:
            header, begins = make_header(shard.specs())
            path = self._path(shard)
            with translated(path, "cannot be written", needed=total):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._descriptors[shard.name] = descriptor
                # Of an earlier run too, which may have been killed between the two.
                os.posix_fallocate(descriptor, 0, len(header) + shard.nbytes)
                os.pwrite(descriptor, header, 0)
            self._begins |= {name: (shard.name, begin) for name, begin in begins.items()}

    def write(self, name: str, data: Tensor, first: int) -> None:
        """Puts values of the tensor `name` in their place: the first is its number `first`."""
        shard, begin = self._begins[name]
        with translated(self.folder / shard, "cannot be written"):
            write_at(self._descriptors[shard], data, begin + first * data.dtype.itemsize)

    def mark(self, piece: int) -> None:
        """Notes that a piece is written; now and then, that it is on disk."""
        with self._mutex:
            self._written.add(piece)
            due = time.monotonic() - self._synced >= _SYNC_SECONDS
        if due and self._syncing.acquire(blocking=False):  # else another thread is at it
            try:
                self._sync()
            finally:
                self._syncing.release()

    def sync(self) -> None:
        """Brings to disk what is written, and notes it."""
        with self._syncing:
            self._sync()

    def finish(self, plan: Plan, config: dict) -> None:
        """Moves the files out, copies what is no weight, writes index and configuration."""
        self.sync()
        with translated(self.folder, "cannot be written"):
            for shard in plan.shards:
                if (self._work / shard.name).exists():
                    os.replace(self._work / shard.name, self.folder / shard.name)
            for path in other_files(plan.checkpoint.folder):
                part = self._work / f"{path.name}.part"
                shutil.copyfile(path, part)
                os.replace(part, self.folder / path.name)
            if len(plan.shards) > 1:
                self._put(INDEX, _index(plan), self.folder)
            self._put(CONFIG, config, self.folder)
            shutil.rmtree(self._work)
            _sync_folder(self.folder)
        self._close()

    def leave(self) -> None:
        """Notes what is written and lets go of the folder, to be gone on with."""
        self.sync()
        self._close()

    def discard(self, *, only_if_fresh: bool) -> None:
        """Removes what was made, unless it is an earlier run's and `only_if_fresh`."""
        self._close()
        if only_if_fresh and self.resumed:
            return
        shutil.rmtree(self._work, ignore_errors=True)
        with suppress(OSError):  # there was something in it, or it was never made
            self.folder.rmdir()

    def _take(self, resume: bool) -> bool:
        """Whether an earlier run is gone on with."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConvertError(f"{self.folder} is a file; DST is a folder that is made")
        if self._work.is_dir():
            if resume:
                return True
            raise ConvertError(
                f"{self.folder} holds an unfinished conversion; --resume goes on with it, "
                f"removing {self._work} makes room for another"
            )
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConvertError(
                f"{self.folder} is there already and not empty; nothing is overwritten, "
                "name another folder or remove it"
            )
        return False

    def _lock_it(self) -> None:
        try:
            fcntl.flock(self._lock[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.resumed = True  # it is another's: not to be removed
            raise ConvertError(f"{self.folder}: another conversion is writing it") from None

    def _settle(self, recipe: dict) -> dict:
        """The recipe to work by: the earlier run's where it is the same but for the "pieces"."""
        path = self._work / _RECIPE
        if not path.is_file():
            with translated(path, "cannot be written"):
                self._put(_RECIPE, recipe, self._work)
            return recipe
        found = json.loads(path.read_text())
        for key in sorted(found.keys() | recipe.keys() - {"pieces"}):
            if key != "pieces" and found.get(key) != recipe.get(key):
                raise ConvertError(
                    f"{self.folder}: the unfinished conversion there has another {key} "
                    f"({_short(found.get(key))}, now {_short(recipe.get(key))}); "
                    f"go on with the same, or remove {self._work}"
                )
        return found

    def _read_journal(self) -> set[int]:
        try:
            journal = json.loads((self._work / _JOURNAL).read_text())
        except (FileNotFoundError, ValueError):
            return set()
        return set(range(journal["all_before"])) | set(journal["and"])

    def _sync(self) -> None:
        """Data first, then the word that it is there."""
        with self._mutex:
            self._synced = time.monotonic()
            journaled = self._journaled | self._written
        with translated(self.folder, "cannot be written"):
            for descriptor in self._descriptors.values():
                os.fdatasync(descriptor)
            before = next(n for n in range(len(journaled) + 1) if n not in journaled)
            more = sorted(piece for piece in journaled if piece > before)
            self._put(_JOURNAL, {"all_before": before, "and": more}, self._work)

    def _path(self, shard: Shard) -> Path:
        """Where a shard lies now: moving them out may have been cut short."""
        moved = self.folder / shard.name
        return moved if moved.exists() else self._work / shard.name

    def _put(self, name: str, value: dict, folder: Path) -> None:
        """Writes a file of JSON whole or not at all."""
        part = self._work / f"{name}.part"
        with part.open("w") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / name)

    def _close(self) -> None:
        for descriptor in (*self._descriptors.values(), *self._lock):
            os.close(descriptor)
        self._descriptors.clear()
        self._lock.clear()


def other_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are copied: tokenizer, templates, code; no weights."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.name not in (CONFIG, INDEX)
        and not path.name.startswith(".")
        and not path.name.endswith((*_WEIGHTS, ".index.json"))
    )


@contextmanager
def translated(path: Path, what: str, needed: int | None = None) -> Iterator[None]:
    """An OSError as a ConvertError that names the path, and the room where there is none."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            room = shutil.disk_usage(_existing(path)).free
            need = f" of {needed:,} bytes needed," if needed is not None else ""
            raise ConvertError(f"{path}: no space left on the disk:{need} {room:,} free") from error
        raise ConvertError(f"{path}: {what}: {error.strerror or error}") from error


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index(plan: Plan) -> dict:
    names = {spec.name: shard.name for shard in plan.shards for spec in shard.specs()}
    return {"metadata": {"total_size": plan.bytes_written}, "weight_map": names}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
