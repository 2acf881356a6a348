"""The readers that the model card promises: each loads the export as its users do.

read.py           all of them for one export, and when each begins
document.py       what one of them found: a row of `readers` in verification.json and of the card
promises.py       which of them the card promises, and the line that it publishes for a Falcon
stock_reader.py   a script: transformers and PEFT, without this package
stock.py          starts the script and judges what it found
own.py            our loader, in a process that holds its model anyway
logits.py         the few tokens that all are asked, and how far two answers are apart
numpy_decoder.py  a script: the 4-bit weights by NumPy alone; shares no code with this package
decoded.py        the decoder's weights against ours, bit by bit
decode_worker.py  a share of them, in a process
"""
