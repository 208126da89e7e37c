"""Text without secrets: what is printed, logged or recorded goes through `scrub`."""

import os
import re

# Of variables, settings and parameters: these words anywhere, or KEY as the last one (SSH_KEY, but no public key).
SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_?KEY|API_?KEY|PRIVATE_?KEY"
    r"|(?<![A-Z0-9])(?<!PUBLIC_)KEY(?![A-Z0-9_])",
    re.IGNORECASE,
)
SHORTEST_SECRET = 6  # characters; a shorter value would blot out ordinary words

_USER_INFO = re.compile(r"(?<=://)[^/\s'\"]*@")  # of a URI, "user:password@"
_QUERY = re.compile(rf"([?&][^=&\s]*(?:{SECRET_NAME.pattern})[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def holds_secret(text: str) -> bool:
    """Whether `scrub` would blot anything out."""
    return scrub(text) != text


def scrub(text: str) -> str:
    """`text` without passwords: neither those inside a URI nor the values of secret environment variables."""
    text = _QUERY.sub(r"\1***", _USER_INFO.sub("***@", text))
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text
