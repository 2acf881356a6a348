"""Long-running drivers: a few rounds of each run in the tests, hundreds in scripts/campaigns/.

kills.py         SIGKILL at random moments of quantize and serialize
disk.py          full disks
headers.py       mutations of safetensors headers
hub_faults.py    every fault at every endpoint of a Hub
hub_kills.py     SIGKILL at random moments of download and push
object_store.py  a server of S3, and drivers that build there, killed at random moments
rebuild_forgeries.py  changes to published artifacts, by a forger who knows the format
cases.py         what people give to build, kind by kind (only in scripts/campaigns/)
"""
