"""Conditions on the metadata of items, in SQL."""

import sqlite3
import threading
from collections.abc import Iterable

from c2f_jax.errors import UserError
from c2f_jax.galleries.item import Item

_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
LONGEST = 1_000_000  # bytes of a value
MOST_STEPS = 1_000_000_000  # of SQLite's machine; about ten seconds


class ItemTable:
    """The metadata of items as a table of SQLite, in memory.

    >>> items = [(4, Item("a.png", [], {"width": 10})), (7, Item("b.png", [], {"width": 90}))]
    >>> ItemTable(items).select("width > 50 or name like 'x%'")
    [7]
    """

    def __init__(self, items: Iterable[tuple[int, Item]]) -> None:
        """Create the table.

        Args:
          items: rows and items; their metadata and "name" are the columns.
        """
        listed = list(items)
        columns = sorted({column for _, item in listed for column in item.metadata} - {"name"})
        self._names = ["name", *columns]
        quoted = [f'"{name.replace(chr(34), chr(34) * 2)}"' for name in self._names]
        # Searches of several threads take turns. A statement that were kept would add up its steps.
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False, cached_statements=0)
        self._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        self._database.execute(f"create table items ({', '.join(quoted)}, row_of_index integer)")
        values = ([item.name, *map(item.metadata.get, columns), row] for row, item in listed)
        places = ", ".join("?" * (len(self._names) + 1))
        self._database.executemany(f"insert into items values ({places})", _printable(values))

        # A condition may come from anywhere: it can read this table and nothing else.
        self._database.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
        )
        self._database.set_progress_handler(lambda: 1, MOST_STEPS)

    def select(self, where: str) -> list[int]:
        """Return the rows of the items that meet a condition.

        Args:
          where: condition in the SQL of SQLite, such as ``date > '2025' and width > 1000``.

        Returns:
          Rows, in the order of the items.

        Raises:
          UserError: the condition is not one, names a column that no item has, or takes too long.
        """
        words = f"select row_of_index from items where ({where}\n) order by rowid"
        try:
            with self._lock:
                return [row for (row,) in self._database.execute(words)]
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise UserError(
                f"--where {where!r}: {error}. Give a condition in SQL on {', '.join(self._names)}"
            ) from error


def _printable(rows: Iterable[list]) -> Iterable[list]:
    """Replace what SQLite cannot store: characters of names that are not UTF-8."""
    for row in rows:
        yield [
            value.encode(errors="replace").decode() if isinstance(value, str) else value
            for value in row
        ]
