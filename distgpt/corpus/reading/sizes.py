"""Sizes of the data read at a time: they bound the memory of a worker."""

UNIT_BYTES = 8 * 2**20  # of text in a piece, about
WINDOW_BYTES = 2**16  # looked at in one go for a place to cut
HEAD_BYTES = 2**16  # of a file, to see whether it is JSON
SEPARATED_BYTES = 2**30  # the longest document before a separator, all of which is in memory at a time
ZSTD_BYTES = 2**10  # each four of which may hold 128 KiB
PARQUET_BATCH = 16  # rows
PARQUET_ROW_BYTES = 64  # memory of a row besides its text, so that a piece of empty rows ends too
