"""What travels back from a client: safetensors bytes for arrays, JSON for numbers. Nothing else is ever parsed."""

from hfedmoe_ray.wire.codecs import build_codec
from hfedmoe_ray.wire.metrics import dump_metrics, parse_metrics
from hfedmoe_ray.wire.names import checksum, expert_key, expert_name
from hfedmoe_ray.wire.payload import PROFILE_FIELDS, pack_update, unpack_update
from hfedmoe_ray.wire.upload import Upload, make_upload, read_upload

__all__ = [
    "PROFILE_FIELDS",
    "Upload",
    "build_codec",
    "checksum",
    "dump_metrics",
    "expert_key",
    "expert_name",
    "make_upload",
    "pack_update",
    "parse_metrics",
    "read_upload",
    "unpack_update",
]
