"""A checkpoint that stays on the Hub: its weights come while they are needed, and go again.

    stretches.py   a file of weights, cut into stretches that are fetched and hashed by themselves
    window.py      whole files, fetched into a spool and dropped: two of them lie there at a time
    serving.py     stretches for worker processes, which have neither network nor token
    reading.py     the bytes of tensors: from files that lie here, or from whoever serves them

Quantizing reads whole files, since only a whole file has a hash that the Hub lists. As a file
passes by, its stretches are hashed, too: whatever is fetched later is held against these hashes, so
that every byte that is read is one of the file that was proved.
"""
