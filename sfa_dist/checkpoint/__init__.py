"""Checkpoints: safetensors and JSON, committed by one rename, readable by any number of ranks and every engine.

    <stage>/checkpoints/step-00000120/
      model.safetensors                     fp32 master value of every trained parameter, by name
      optimizer-00000-of-00002.safetensors  the moments that each rank owns: `<parameter>/<start>/<moment>`
      state.json                            step, position in the data, counters, hashes of trunk and recipe, probe
      MANIFEST.json                         size and sha256 of the files above; written last

The frozen trunk is not in it: `state.json` holds its hash. A directory ending in `.tmp` is a save that did not finish;
it is never read.

    files     flushed writes, retried reads                   layout      the offsets of a safetensors file
    staging   an engine's state copied to host memory         writing     what one rank writes of a save
    folder    list, verify, commit and purge checkpoints      saver       a save in the background, over all ranks
    loading   from any number of ranks to any other           missing     recorded in log.jsonl, but gone
    probe     a loss that shows whether weights still fit     failpoints  points at which a test makes a process fail

Start with `saver`.
"""

from sfa_dist.boundary.disk import file_sha256, write_json
from sfa_dist.checkpoint.files import write_tensors, write_weights
from sfa_dist.checkpoint.folder import FORMAT, list_checkpoints, newest_valid, read_state, verify
from sfa_dist.checkpoint.loading import load_engine, read_parameters
from sfa_dist.checkpoint.saver import Outcome, Saver

__all__ = [
    "FORMAT",
    "Outcome",
    "Saver",
    "file_sha256",
    "list_checkpoints",
    "load_engine",
    "newest_valid",
    "read_parameters",
    "read_state",
    "verify",
    "write_json",
    "write_tensors",
    "write_weights",
]
