"""The build folder: where each stage leaves its files, and the record that says it is done.

    artifacts/<org>--<name>@<sha12>[-<tag of any recipe but the default>]/
      source/        the pinned checkpoint: links to where its files are
      quantized/     one safetensors per source shard, each complete or absent
      export/        the publishable folder
      streamed/      of weights that stay on the Hub: headers and hashes
      records/       one small JSON per finished stage
      build.json     the source and the recipe that it is for, from before the first byte
      remote.json    the URL of which the folder is the local copy, if it is one
      sent.json      what a Hub has received, and need not lie here
      .lock          held by the process that works here; .lock.* by those that make a file each

A record holds the stage's key, every output with its size, sha256 and stamp (times and inode),
what the next stages need to know, and what the work took; that of a stage that judges holds the
files that it judged, too. It is written last. A stage is done if its record has the key that it
would have now, and its outputs still hash as recorded; a record that cannot be read counts as none.

build.py      the folder: where things are, its lock
makers.py     who makes which file, where several processes do
record.py     what a finished stage leaves, in memory and as JSON
spec.py       build.json
variant.py    what of a recipe shapes the bytes, and the tag that says so in a folder's name
remote.py     a build at a URL, of which the folder is the local copy
sent.py       sent.json
freshness.py  whether a stage is done, stale or missing; whether its outputs are what it left
"""

from nf4_pipeline.build_folder.build import Build
from nf4_pipeline.build_folder.freshness import Inputs, State
from nf4_pipeline.build_folder.record import Facts, Record, RecordKind

__all__ = ["Build", "Facts", "Inputs", "Record", "RecordKind", "State"]
