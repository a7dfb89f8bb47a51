"""NIST SPHERE."""

from __future__ import annotations

from fedasr.data.containers.contents import Contents, Unusable
from fedasr.data.containers.lengths import cut_short

MAGICS = (b"NIST_1A",)


def read(content: bytes) -> Contents:
    """A SPHERE file; see `examine`."""
    try:
        length = int(content[8:16])
        text = content[16:length].decode("ascii").split("end_head")[0]
        lines = [line.split(maxsplit=2) for line in text.splitlines() if line.strip()]
        fields = {name: value for name, _, value in lines}
        channels = int(fields.get("channel_count", 1))
        coding = fields.get("sample_coding", "pcm").strip()
        each = int(fields.get("sample_n_bytes", 2)) * channels
        frames = int(fields["sample_count"]) if "sample_count" in fields else None
    except (ValueError, UnicodeDecodeError) as error:
        raise Unusable(f"SPHERE: its header is damaged ({error})") from error
    if "," in coding or coding not in ("pcm", "ulaw", "alaw", "mu-law", "a-law"):
        raise Unusable(f"SPHERE with {coding}, which is not read: convert it with sph2pipe -f wav")
    if each < 1:
        raise Unusable("SPHERE: its header is damaged (no bytes in a sample)")
    there = len(content) - length
    if frames is None:
        frames = there // each
    if frames * each > there:
        raise cut_short("SPHERE", max(0, there), frames * each)
    rest = content[length + frames * each :]
    if rest.strip(b"\0"):
        raise Unusable(f"SPHERE: {len(rest)} bytes more than its header says: damaged")
    return Contents((content,), frames)
