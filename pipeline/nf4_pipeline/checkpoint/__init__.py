"""The only code that knows safetensors bytes on disk.

    files.py        which files of a repository are taken, and which travel into an export
    weight_files.py which weight files of a folder are the model: those that transformers loads
    safetensors_header.py  parsing and writing the header, strictly: every byte is accounted for
    named_path.py   a path as somebody wrote it, looked at before the system is asked for it
    model_name.py   what stands where a model is wanted and is no folder
    named_source.py of which model an artifact says that it is, for messages
    plain_file.py   reading a file that may be a pipe, a device or far too large
    strict_json.py  untrusted JSON, limited before it is parsed
    generation_config.py  generation_config.json, of the types that generating needs
    untrusted.py    an untrusted folder: links, sizes, small files
    source_card.py  what the model card says of license and language, limited before it is parsed
    lfs_pointer.py  Git LFS pointers in place of files
    folder_advice.py  what a folder without a usable checkpoint looks like, and the way out
    block_names.py  which block of a model a tensor is in, by its name alone
    source.py       a checkpoint folder (one file, or shards with an index) as a list of tensors
    skeleton.py     a folder of small files and headers, without weights
    quantized_formats.py  which quantization a checkpoint already has, by its tensors
    strip_prefix.py a checkpoint copied without a wrapper's prefix on its names
    layout.py       where each tensor of an output file will stand, before any byte is written
    sink.py         what takes the bytes of an output file: a file, or hashes alone
    writer.py       an output file that is complete or absent, written by any thread
    shards.py       weight files cut into shards, without parting what belongs together
    atomic.py       small files and links that are complete or absent; order of fsync and rename
    digest.py       sha256 of files, and of the tensors in them, in one reading

What the tensors mean is not known here: `nf4/` is above.
"""
