"""A checkpoint that stays on the Hub: its weights come while they are needed, and go again.

    stretches.py   a file of weights, cut into stretches that are fetched and hashed by themselves
    passing.py     a file that passes by: hashed to its end, and read meanwhile, in memory
    serving.py     stretches for worker processes, which have neither network nor token
    reading.py     the bytes of tensors: from files that lie here, or from whoever serves them

Only a whole file has a hash that the Hub lists. So what is made of a file while it passes by for
the first time counts when its end has come and that hash agrees. Its stretches are hashed, too:
whatever is fetched later is held against these hashes, so that every byte that is read is one of
the file that was proved.
"""
