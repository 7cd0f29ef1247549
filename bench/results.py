"""The sections of bench/RESULTS.md that the benchmarks write themselves."""

import re
from pathlib import Path

FILE = Path(__file__).with_name("RESULTS.md")
# Flags that say how fast a processor computes in bfloat16 and float32.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def write_section(title: str, text: str, file: Path = FILE) -> None:
    """Replace the section with this title, or add it at the end."""
    section = f"## {title}\n\n{text.strip()}\n"
    before, found, after = file.read_text(encoding="utf-8").partition(f"## {title}\n")
    if not found:
        before, after = before.rstrip() + "\n\n", ""
    rest = after[next_heading.start() :] if (next_heading := re.search(r"^## ", after, re.MULTILINE)) else ""
    file.write_text(before + section + ("\n" + rest if rest else ""), encoding="utf-8")


def processor() -> str:
    """Return the name of the processor and those of FLAGS that it has, from /proc/cpuinfo."""
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    flags = [flag for flag in FLAGS if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', 'unknown processor')} ({', '.join(flags)})"
