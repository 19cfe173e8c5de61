"""Runs Xen's verify-stream-v2 on a libxl stream, or on a file of `xl save` or `xl migrate` with
xl's own header in front, which it does not know. Arguments: the tools' folder, the file."""

import os
import struct
import sys
import tempfile

MAGIC = b"Xen saved domain, xl format\n \0 \r"


def main():
    tools, path = sys.argv[1:]
    with open(path, "rb") as stream:
        start = 0
        head = stream.read(48)
        if head[:32] == MAGIC:
            start = 48 + struct.unpack_from("<I", head, 44)[0]
        stream.seek(start)
        if stream.read(8) != b"LibxlFmt":
            sys.exit(f"{path}: no libxl stream at offset {start}")
        stream.seek(start)
        # The verifier wants a regular file that begins with the stream; it seeks nowhere.
        if start == 0:
            rest = path
        else:
            copy = tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(path)))
            rest = copy.name
            while block := stream.read(1 << 20):
                copy.write(block)
            copy.flush()
        command = [sys.executable, f"{tools}/verify-stream-v2", "-f", "libxl", "-i", rest]
        sys.exit(os.spawnv(os.P_WAIT, sys.executable, command))


if __name__ == "__main__":
    main()
