"""What the Content-Security-Policies of runs.py report and sample.py --serve are made of."""

import base64
import hashlib
import re


def content_hash(page: str, tag: str) -> str:
    """The source, for a Content-Security-Policy, that allows the page's one <script> or <style>."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
