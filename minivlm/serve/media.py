"""Pictures of a request: `data:` URLs to bytes. Decoding is minivlm.data.images, the same as for training."""

import base64
import binascii

from minivlm.serve.errors import ApiError


def decode_data_url(url: str, *, max_bytes: int) -> bytes:
    """The encoded picture (JPEG, PNG, ...) inside a `data:image/...;base64,` URL.

    The declared type is not believed: the decoder looks at the bytes.

    Raises:
        ApiError: 400 for any other URL (nothing is fetched, no file is read) or broken base64; 422 above `max_bytes`.
    """
    head, comma, payload = url.partition(",")
    scheme, _, media = head.partition(":")
    if scheme.lower() != "data" or not comma:
        raise _refused("only data URLs are accepted: send the picture itself as data:image/png;base64,...")
    kind, *parameters = media.lower().split(";")
    if not kind.startswith("image/") or "base64" not in parameters:
        raise _refused("a picture must be sent as data:image/...;base64,...")
    if len(payload) * 3 // 4 > max_bytes + 3:
        raise ApiError(422, f"a picture is larger than {max_bytes} bytes", param="messages", code="invalid_image")
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise _refused("the picture's base64 is broken") from None
    if not data:
        raise _refused("the picture is empty")
    return data


def _refused(message: str) -> ApiError:
    return ApiError(400, f"image_url: {message}", param="messages", code="invalid_image_url")
