"""Make and open an index, whatever stores its rows."""

from __future__ import annotations

from os import PathLike

from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.galleries.gallery_index import HEADER, About, GalleryIndex, Header, read_header
from c2f_jax.galleries.index_folder import IndexFolder
from c2f_jax.galleries.index_table import IndexTable

STORES: dict[str, type[GalleryIndex]] = {index.store: index for index in (IndexFolder, IndexTable)}


def create_index(
    path: str | PathLike[str], about: About, store: str = IndexFolder.store
) -> GalleryIndex:
    """Make an empty index.

    Args:
      path: its folder, local or gs://, which must be missing or empty.
      about: what it is of.
      store: what stores its rows: "folder" or "lance".

    Raises:
      UserError: there is something else, the folder cannot be made, or there is no such store.
    """
    folder = epath.Path(path)
    if store not in STORES:
        raise UserError(f"store={store}: must be one of {', '.join(STORES)}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} holds something else: give a path that does not exist")
        index = STORES[store](folder, Header(about, False, store, None))
        folder.mkdir(parents=True, exist_ok=True)
        index.write_header()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}): give the path of a folder"
        ) from error
    return index


def open_index(path: str | PathLike[str]) -> GalleryIndex:
    """Open an index; its rows are read when they are asked for.

    Raises:
      UserError: it is missing, damaged, or written by a later version.
    """
    header = read_header(path)
    if header.store not in STORES:
        raise UserError(f"{path} is stored in {header.store}, which a later c2f_jax reads")
    return STORES[header.store](epath.Path(path), header)


def index_exists(path: str | PathLike[str]) -> bool:
    """Return whether there is an index at a path."""
    return (epath.Path(path) / HEADER).exists()
