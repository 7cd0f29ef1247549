"""From the files that a user names to documents of text.

Reading order: sources (an input file and the pieces it is cut into), finding (the files that --input names), remote
(those of URLs), formats (the format of a file), streams (its bytes, decompressed and in UTF-8), reader (opens any
source; plain text), json_text and parquet (the documents in these formats).

The files may import errors alone.
"""
