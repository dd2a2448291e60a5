"""The frames of FLAC: how many samples they hold, whatever the header says."""

import struct

from c2f_jax.errors import BadFileError

# Hz by their codes in a frame of FLAC; 0 for the one in the file's header.
_RATES = (
    *(0, 88_200, 176_400, 192_000, 8_000, 16_000),
    *(22_050, 24_000, 32_000, 44_100, 48_000, 96_000),
)


def flac_samples(data: bytes, name: str) -> tuple[int, int]:
    """Return the number of samples up to the end of the last frame, and where that begins.

    Both are 0 if there are no frames. The numbers of a part of a recording need not begin at 0.

    Args:
      data: a FLAC file.
      name: what errors call it.

    Raises:
      BadFileError: its frames are not as its header says.
    """
    place, last = 4, False
    while not last and place + 4 <= len(data):
        last = data[place] >= 128
        place += 4 + int.from_bytes(data[place + 1 : place + 4], "big")
    first = place
    sync = data[first : first + 2]  # all frames begin with the same
    if first + 16 > len(data):
        return 0, 0
    begin, end = _frame(data, first)
    if sync not in (b"\xff\xf8", b"\xff\xf9") or not end:
        raise BadFileError(
            f"{name}: damaged, the frames of this FLAC are not as its header says", "unreadable"
        )
    place = len(data)
    while (place := data.rfind(sync, first, place)) >= 0:
        end = _frame(data, place)[1]
        if end > begin:
            return end - begin, place
    return 0, 0


def _frame(data: bytes, place: int) -> tuple[int, int]:
    """Return the numbers of the first sample of a frame and of the one after it, or 0, 0."""
    head = data[place : place + 16]
    if len(head) < 16 or head[3] & 1 or head[3] >> 4 > 10:
        return 0, 0
    size_code, rate_code = head[2] >> 4, head[2] & 15
    rate = struct.unpack_from(">I", data, 18)[0] >> 12
    if size_code == 0 or rate_code == 15 or 0 < rate_code < 12 and rate != _RATES[rate_code]:
        return 0, 0

    # The number is coded as in UTF-8, of up to seven bytes.
    length = max(8 - (~head[4] & 0xFF).bit_length(), 1)
    number = head[4] & (0x7F >> (length if length > 1 else 0))
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 63
    at = 4 + length
    if size_code in (6, 7):
        width = size_code - 5
        size = int.from_bytes(head[at : at + width], "big") + 1
        at += width
    else:
        size = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 1 << size_code
    at += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return 0, 0
    smallest, largest = struct.unpack_from(">HH", data, 8)
    if size > largest:
        return 0, 0
    begin = number if head[1] & 1 else number * smallest
    return begin, begin + size


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
        table.append(value)
    return table


_CRC8, _CRC16 = _crc_table(0x107, 8), _crc_table(0x18005, 16)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def is_whole(frame: bytes) -> bool:
    """Return whether bytes that begin with a frame end with its checksum."""
    value = 0
    for byte in frame:
        value = (value << 8 & 0xFFFF) ^ _CRC16[value >> 8 ^ byte]
    return value == 0
