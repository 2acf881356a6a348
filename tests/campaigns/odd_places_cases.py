"""The cases of `odd_places.py`, and the builds that they start from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.campaigns.odd_places import ROOT, Case
from tests.support.tiny import copy_of, nf4, write_falcon, write_recipe

STAGES: Final = {
    "downloaded": "quantize",
    "quantized": "serialize",
    "exported": "verify",
    "verified": "attest",
}
"""A build folder that has come so far, and the stage that comes next."""

AS_NOBODY: Final = f"chmod -R a+rwX .; as_nobody {sys.executable} -m nf4_pipeline"
QUANTIZE: Final = "copy downloaded; nf4 quantize --build-dir build"
VERIFY: Final = "copy exported; nf4 verify --recipe $recipe --build-dir build"
DOWNLOAD: Final = "nf4 download $model --build-dir build"


def make_places(folder: Path) -> dict[str, Path]:
    """A tiny checkpoint, a recipe, and builds of it that have come so far; or those of before."""
    names = ("model", *STAGES, "whole")
    places = {name: folder / name for name in names} | {"recipe": folder / "recipe" / "recipe.toml"}
    if (folder / "whole").is_dir():
        return places
    write_falcon(places["model"])
    write_recipe(folder / "recipe")
    at = places["downloaded"]
    done = nf4("download", places["model"], "--build-dir", at, cwd=folder)
    assert done.status == 0, done.err
    for (name, stage), after in zip(STAGES.items(), (*list(STAGES)[1:], "whole"), strict=True):
        copy_of(places[name], places[after])
        own: list[str | Path] = ["--recipe", places["recipe"]] if stage == "verify" else []
        done = nf4(stage, *own, "--build-dir", places[after], cwd=folder)
        assert done.status == 0, done.err
    return places


def _cases() -> Iterator[Case]:
    yield from _numba()
    yield from _temporary()
    yield from _home()
    yield from _disks()
    yield from _limits()
    yield from _file_systems()
    yield from _names()
    yield from _users()
    yield from _torchless()
    yield from _variables()
    yield from _python()
    yield from _inputs()
    yield from _signals()
    yield from _together()
    yield from _clocks()


def _numba() -> Iterator[Case]:
    item = "numba's cache"
    mine = "export NUMBA_CACHE_DIR=$PWD/cache"
    for name, lines in {
        "read-only": f"read_only cache; {mine}",
        "full": f"memory cache size=8k; fill cache; {mine}",
        "nearly full": f"memory cache size=16k; {mine}",
        "without inodes": f"memory cache nr_inodes=3; {mine}",
    }.items():
        yield Case(item, name, f"{lines}; {QUANTIZE}", root=True)
    for name, path in {"a file": "/etc/passwd", "a device": "/dev/null", "no": "/proc/x"}.items():
        yield Case(item, f"{name} folder", f"export NUMBA_CACHE_DIR={path}; {QUANTIZE}")
    yield Case(
        item,
        "package read-only, no home",
        f"read_only {ROOT / 'pipeline'}; export HOME=/proc/x; unset XDG_CACHE_HOME; {QUANTIZE}",
        root=True,
    )
    yield Case(
        item,
        "damaged",
        f"mkdir cache; {mine}; {QUANTIZE}; rm -r build\n"
        f"for f in $(find cache -type f); do echo x > $f; done; {QUANTIZE}",
    )


def _temporary() -> Iterator[Case]:
    item = "TMPDIR"
    for name, path in {"missing": "/nonexistent", "a file": "/etc/passwd", "empty": ""}.items():
        yield Case(item, name, f"export TMPDIR={path}; {DOWNLOAD}")
    yield Case(item, "read-only", f"read_only t; TMPDIR=$PWD/t; {DOWNLOAD}", root=True)
    yield Case(
        item,
        "full",
        f"memory t size=64k; fill t; export TMPDIR=$PWD/t; {DOWNLOAD}",
        root=True,
    )
    yield Case(
        item,
        "without inodes",
        f"memory t nr_inodes=3; export TMPDIR=$PWD/t; {DOWNLOAD}",
        root=True,
    )
    none = "for d in /tmp /var/tmp /usr/tmp; do read_only $d; done; unset TMPDIR; cd /proc"
    for command in ("download $model --build-dir /dev/shm/x", "status", "--help"):
        status, said = ((1,), "TMPDIR") if "download" in command else ((0,), "")
        lines = f"{none}; nf4 {command}"
        yield Case(item, f"none at all: {command.split()[0]}", lines, status, said, root=True)
    yield Case(
        item,
        "full in verify",
        f"memory t size=48k; export TMPDIR=$PWD/t; {VERIFY}",
        (1,),
        "Error: ",
        root=True,
    )


def _home() -> Iterator[Case]:
    for name, setting in {
        "unset": "unset HOME HF_HOME",
        "empty": "export HOME=; unset HF_HOME",
        "a device": "export HOME=/dev/null; unset HF_HOME",
        "missing": "export HOME=/nonexistent/x; unset HF_HOME",
        "read-only": "read_only h; export HOME=$PWD/h; unset HF_HOME",
        "full": "memory h size=4k; fill h; export HOME=$PWD/h; unset HF_HOME",
    }.items():
        root = "memory" in setting or "read_only" in setting
        yield Case("HOME", name, f"{setting}; {DOWNLOAD}; nf4 status --build-dir build", root=root)
    yield Case("HOME", "unset, verify", f"unset HOME HF_HOME; {VERIFY}", seconds=200)
    yield Case("HOME", "~ in a path", "nf4 download '~nobody-here/x'", (2,), "no home folder")
    for name, path in {"a file": "/etc/passwd", "missing": "/proc/x/y", "empty": ""}.items():
        lines = f"export HF_HOME={path}; {DOWNLOAD}; nf4 download org/name"
        yield Case("HF cache", name, lines, (1,), "Error: ")
    online = "export HF_HUB_OFFLINE=0 HF_ENDPOINT=http://127.0.0.1:9"
    yield Case("HF cache", "read-only, no Hub", f"{online}; nf4 download org/name", (1,), "Error: ")


def _disks() -> Iterator[Case]:
    item = "read-only build"
    read_only = "copy whole; read_only build"
    for command, status in {
        "status --build-dir build": (0,),
        "status": (0,),
        "inspect build": (0,),
        "inspect build/export": (0,),
        "push --dry-run --repo-id a/b --build-dir build": (0,),
        "prompt build hello --max-new-tokens 2": (0,),
        "reproduce build/export --source $model": (0,),
        "quantize --build-dir build": (1,),
        "build $model --build-dir build": (1,),
        "download $model --build-dir build": (0,),
        "attest --build-dir build": (1,),
    }.items():
        yield Case(item, command, f"{read_only}; nf4 {command}", status, root=True, seconds=200)
    item = "no inodes left"
    for name, stage in STAGES.items():
        own = "--recipe $recipe" if stage == "verify" else ""
        lines = (
            f"memory d nr_inodes=100; copy {name} d/build; "
            f"i=0; while touch d/$i 2>/dev/null; do let ++i; done; cp -a {'$' + name} before\n"
            f"nf4 {stage} {own} --build-dir d/build; s=$?; rm d/[0-9]*; "
            f"diff -r before/records d/build/records && nf4 {stage} {own} --build-dir d/build "
            "&& exit $s"
        )
        yield Case(item, stage, lines, (1,), "Error: .*space", root=True, seconds=200)


def _limits() -> Iterator[Case]:
    for count in (6, 8, 10, 12, 16, 24, 32, 64):
        lines = f"copy downloaded; ulimit -n {count}; nf4 quantize --build-dir build"
        yield Case("ulimit -n", f"{count}, quantize", lines, (0, 1))
        yield Case("ulimit -n", f"{count}, download", f"ulimit -n {count}; {DOWNLOAD}", (0, 1))
    for count in (20, 64):
        yield Case("ulimit -n", f"{count}, verify", f"ulimit -n {count}; {VERIFY}", (0, 1))
    for count in (1, 2, 3, 4, 6, 10, 20):
        for name, stage in (("quantize", "quantize"), ("download", "download $model")):
            lines = (
                f"copy downloaded; chmod -R a+rwX .; ulimit -u {count}; "
                f"as_nobody {sys.executable} -m nf4_pipeline {stage} --build-dir build"
            )
            yield Case("ulimit -u", f"{count}, {name}", lines, (0, 1), root=True)
    lines = (
        "copy exported; chmod -R a+rwX .; ulimit -u 3; "
        f"as_nobody {sys.executable} -m nf4_pipeline verify --recipe $recipe --build-dir build"
    )
    yield Case("ulimit -u", "3, verify", lines, (0, 1), root=True)
    for kind, value in (("v", 600_000), ("v", 2_000_000), ("d", 300_000), ("s", 200), ("c", 0)):
        for name, line in (("quantize", QUANTIZE), ("download", DOWNLOAD)):
            lines = f"ulimit -{kind} {value}; {line}"
            yield Case(f"ulimit -{kind}", f"{value}, {name}", lines, (0, 1))
    yield Case("ulimit -v", "2000000, verify", f"ulimit -v 2000000; {VERIFY}", (0, 1))
    yield Case("ulimit -t", "3, verify", f"ulimit -t 3; {VERIFY}", (0, 1, 137, 152))


def _file_systems() -> Iterator[Case]:
    item = "exFAT"
    disk = (
        "truncate -s 100M img; mkfs.exfat img >/dev/null; mkdir d; l=$(losetup -f --show img); "
        "trap 'umount d; losetup -d $l' EXIT; mount.exfat-fuse $l d >/dev/null || exit 77; "
    )
    for name, lines, status, said in (
        ("build", "nf4 build $model --build-dir d/build", 1, "no symbolic links.*--build-dir"),
        ("artifacts", "cd d; nf4 build $model; s=$?; cd ..; (exit $s)", 1, "no symbolic links"),
        (
            "model",
            "cp -r $model d/m; nf4 download d/m --build-dir b && nf4 quantize --build-dir b",
            0,
            "",
        ),
        (
            "artifact",
            "cp -r $whole/export d/e; nf4 inspect d/e && nf4 reproduce d/e --source $model",
            0,
            "",
        ),
        ("TMPDIR", f"export TMPDIR=$PWD/d; {VERIFY}", 0, ""),
        ("HF cache", f"export HF_HOME=$PWD/d; {DOWNLOAD}", 0, ""),
        ("HOME", f"export HOME=$PWD/d NUMBA_CACHE_DIR=$PWD/d; {DOWNLOAD}", 0, ""),
    ):
        yield Case(item, name, disk + lines, (status,), said, root=True, seconds=200)
    item = "calls that a file system lacks"
    for name, calls, lines, status, said in (
        ("hard links", "link linkat", "copy quantized; nf4 serialize --build-dir build", 0, ""),
        ("symbolic links", "symlink symlinkat", DOWNLOAD, 1, "no symbolic links"),
        ("locks", "flock", QUANTIZE, 1, "has no locks.*--build-dir"),
        ("locks, for temporary files", "flock", "nf4 inspect $whole", 0, ""),
        (
            "exchange of names",
            "renameat2",
            "copy exported; nf4 serialize --max-shard-size 40KB --build-dir build",
            0,
            "",
        ),
        (
            "hints",
            "sync_file_range posix_fadvise posix_fadvise64 posix_fallocate posix_fallocate64",
            QUANTIZE,
            0,
            "",
        ),
        ("fsync", "fsync", QUANTIZE, 1, "Error: "),
        ("statvfs", "statvfs statvfs64 fstatvfs fstatvfs64", QUANTIZE, 1, "Error: "),
        ("inotify, eventfd", "inotify_init eventfd", DOWNLOAD, 0, ""),
        ("prctl", "prctl", DOWNLOAD, 0, ""),
    ):
        shim = "".join(f"int {call}() {{ errno = E; return -1; }}\n" for call in calls.split())
        number = "ENOLCK" if "flock" in calls else "EPERM" if "link" in calls else "ENOSYS"
        made = (
            f"printf '#include <errno.h>\n#define E {number}\n{shim}' | "
            "gcc -w -fno-builtin -shared -fPIC -x c - -o no.so && "
        )
        before, _, last = lines.rpartition("nf4 ") if lines.startswith("copy") else ("", "", lines)
        line = f"{made} {before} export LD_PRELOAD=$PWD/no.so; nf4 {last.removeprefix('nf4 ')}"
        yield Case(item, name, line, (status,), said)


def _names() -> Iterator[Case]:
    item = "names"
    long = "x" * 200
    for name, path in {
        "spaces": "a b/ c ",
        "a line break": "a\nb",
        "letters": "ünïcödé/模型",
        "600 characters": f"{long}/{long}/{long}",
        "a brace": "{a}/%s/[x]*?",
        "a dash": "./-x",
        "quotes": "a'b\"c",
        "an escape": "a\x1b[31mb",
        "a colon": "a:b=c",
        "a backslash": "a\\b",
        "a rich tag": "[bold red]a[/]",
        "a tilde inside": "x/~root",
        "right to left": "a\u202eb",
    }.items():
        quoted = "'" + path.replace("'", "'\\''") + "'"
        lines = (
            f'p={quoted}; mkdir -p "$p"; cp -r $model "$p/model"; nf4 download "$p/model" '
            '--build-dir "$p/build" && nf4 quantize --build-dir "$p/build" && '
            'nf4 serialize --build-dir "$p/build" && nf4 status --build-dir "$p/build" && '
            'nf4 inspect "$p/build"'
        )
        yield Case(item, name, lines)
    lines = "p=$'a\\xffb'; mkdir $p; cp -r $model $p/model; nf4 download $p/model --build-dir build"
    yield Case(item, "not UTF-8", lines, (2,), "not UTF-8")
    for name, lines in {
        "trailing slash": "nf4 download $model/ --build-dir b/ && nf4 quantize --build-dir b/",
        "dot": "copy downloaded; cd build; nf4 quantize --build-dir .",
        "dots": "copy downloaded; mkdir x; cd x; nf4 quantize --build-dir ../build/../build//",
        "model as dot": "cp -r $model m; cd m; nf4 download . --build-dir ../build",
        "through a link": "copy downloaded; ln -s build l; nf4 quantize --build-dir l",
        "model through a link": "ln -s $model m; nf4 download m --build-dir build",
        "build folder is a broken link": "ln -s nowhere build; " + DOWNLOAD,
        "build folder is a link to a disk": "mkdir /dev/shm/nf4-x; ln -s /dev/shm/nf4-x build; "
        + DOWNLOAD
        + "; s=$?; rm -rf /dev/shm/nf4-x; exit $s",
        "build folder is a file": "touch build; " + DOWNLOAD,
        "build folder is below a file": "touch x; nf4 download $model --build-dir x/build",
        "build folder is a device": "nf4 download $model --build-dir /dev/null",
        "build folder is /proc": "nf4 download $model --build-dir /proc",
        "build folder is the model": "cp -r $model m; nf4 download m --build-dir m",
        "build folder is in the model": "cp -r $model m; nf4 download m --build-dir m/build",
        "model is in the build folder": "mkdir b; cp -r $model b/m; nf4 download b/m --build-dir b",
        "model is the artifact": "nf4 build $whole/export",
        "model is the build": "nf4 build $whole",
        "an empty name": "nf4 download ''",
        "an empty build folder": "nf4 download $model --build-dir ''",
        "export is a link": "copy quantized; mkdir x; ln -s ../x build/export; "
        'nf4 serialize --build-dir build; s=$?; [ -z "$(ls x)" ] && exit $s || exit 9',
        "quantized is a link": "copy downloaded; mkdir x; ln -s ../x build/quantized; "
        "nf4 quantize --build-dir build",
        "records is a file": "copy downloaded; rm -r build/records; touch build/records; "
        "nf4 quantize --build-dir build",
        "lock is a folder": "copy downloaded; rm build/.lock; mkdir build/.lock; "
        "nf4 quantize --build-dir build",
        "lock is a pipe": "copy downloaded; rm build/.lock; mkfifo build/.lock; "
        "nf4 quantize --build-dir build",
        "lock is a link out": "copy downloaded; echo mine > x; ln -sf ../x build/.lock; "
        "nf4 quantize --build-dir build; s=$?; grep -q mine x && exit $s || exit 9",
        "working folder gone": "copy downloaded; mkdir g; cd g; rmdir ../g; "
        "nf4 quantize --build-dir $OLDPWD/build; nf4 status",
    }.items():
        yield Case(item, name, lines, (0, 1, 2))
    for name in ("source", "quantized", "export", "calibration", "converted", "records"):
        lines = (
            "copy downloaded; mkdir -p mine/folder; touch mine/file mine/folder/x; ln -s y mine/l; "
            f"rm -rf build/{name}; ln -s ../mine build/{name}; for c in quantize "
            "'quantize --calibrate self' serialize verify 'build $model'; do "
            "eval nf4 $c --build-dir build || break; done; "
            '[ "$(find mine | wc -l)" = 5 ] || exit 9; exit 1'
        )
        yield Case(item, f"{name} is a link to files of the user", lines, (1,))


def _users() -> Iterator[Case]:
    item = "another user"
    for name, lines in {
        "without an entry": f"copy downloaded; HOME=/; {AS_NOBODY} quantize --build-dir build",
        "verify": f"copy exported; unset HOME USER LOGNAME; {AS_NOBODY} verify --recipe $recipe "
        "--build-dir build",
        "attest": f"copy verified; unset HOME; {AS_NOBODY} attest --build-dir build",
        "doctor": f"unset HOME HF_HOME; {AS_NOBODY} doctor",
        "download": f"unset HOME HF_HOME; {AS_NOBODY} download $model --build-dir build",
    }.items():
        yield Case(item, name, lines, root=True)
    for name, lines in {
        "no right to the build": "copy downloaded; mkdir t; chmod 777 t; as_nobody "
        f"{sys.executable} -m nf4_pipeline quantize --build-dir build",
        "no right to the folder": f"as_nobody {sys.executable} -m nf4_pipeline download $model",
        "lock of another": f"copy downloaded; chmod -R a+rwX .; chmod 600 build/.lock; as_nobody "
        f"{sys.executable} -m nf4_pipeline quantize --build-dir build",
    }.items():
        yield Case(item, name, lines, (1,), "Give this user the right", root=True)
    for mask, mode in (
        ("077", "600"),
        ("022", "644"),
        ("027", "640"),
        ("002", "664"),
        ("0", "666"),
    ):
        lines = (
            f"umask {mask}; copy verified; rm -r build/export build/records/[s-v]* build/quantized "
            "build/records/q*; nf4 quantize --build-dir build && "
            "nf4 serialize --build-dir build && "
            "find build/export build/quantized build/records/[qs]* -type f ! -name model.sig "
            "-printf '%m %p\\n' | sort | "
            f"(! grep -v '^{mode}')"
        )
        yield Case("umask", mask, lines)


def _variables() -> Iterator[Case]:
    for value in ("-1", "99", "x", "0,0", ",", "NoDevFiles", "GPU-0", "  ", "MIG-x", "0" * 5000):
        lines = f"export CUDA_VISIBLE_DEVICES='{value}'; {DOWNLOAD} && nf4 doctor"
        yield Case("CUDA_VISIBLE_DEVICES", value[:10], lines, (0, 1))
    for value in ("0", "x", "100000"):
        lines = f"export OMP_NUM_THREADS='{value}'; {VERIFY}"
        yield Case("OMP_NUM_THREADS", value, lines, seconds=200)
    for name, value in {
        "NUMBA_NUM_THREADS": "0",
        "NUMBA_DISABLE_JIT": "1",
        "MKL_NUM_THREADS": "x",
        "HF_HUB_OFFLINE": "maybe",
        "HF_ENDPOINT": "no address",
        "PYTHONHASHSEED": "123",
        "PYTHONWARNINGS": "error",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "utf-16",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDEVMODE": "1",
        "PYTHONOPTIMIZE": "2",
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPROFILEIMPORTTIME": "",
        "TZ": "Nowhere/At all",
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "xx_YY",
        "COLUMNS": "-5",
        "TERM": "x\x1b",
        "MALLOC_ARENA_MAX": "0",
        "TRANSFORMERS_CACHE": "/proc/x",
        "TORCH_HOME": "/proc/x",
        "TRANSFORMERS_VERBOSITY": "loud",
        "HF_HUB_VERBOSITY": "loud",
        "HF_HUB_DOWNLOAD_TIMEOUT": "soon",
        "HF_HUB_ETAG_TIMEOUT": "soon",
        "BNB_CUDA_VERSION": "999",
        "TORCH_LOGS": "+all",
        "NUMBA_DEBUG": "x",
        "MPLCONFIGDIR": "/proc/x",
        "OPENBLAS_NUM_THREADS": "0",
        "CUBLAS_WORKSPACE_CONFIG": "x",
        "PYTORCH_CUDA_ALLOC_CONF": "x:y",
        "TORCHDYNAMO_DISABLE": "x",
        "NF4_DEBUG": "",
    }.items():
        yield Case(
            "variables",
            f"{name}={value}",
            f"export {name}={value!r}; {DOWNLOAD} && nf4 quantize --build-dir build && "
            "nf4 serialize --build-dir build && nf4 status --build-dir build",
            (2,) if name == "NUMBA_NUM_THREADS" else (0,),
        )
    for value in ("UTC-25:99", "<+99>99", "\\x01", ":/dev/zero", "America/St_Johns", "x" * 5000):
        lines = f"export TZ='{value}'; copy verified; nf4 attest --build-dir build"
        yield Case("TZ", value[:20], lines)


def _torchless() -> Iterator[Case]:
    for package in ("torch", "transformers", "numba", "bitsandbytes"):
        less = (
            f'mkdir no; echo \'raise ImportError("no {package} here", name="{package}")\' '
            f"> no/{package}.py; "
            "export PYTHONPATH=$PWD/no:$PYTHONPATH; "
        )
        for command, status in {
            "--help": (0,),
            "status --build-dir $whole": (0, 1) if package == "numba" else (0,),
            "inspect $whole": (0,),
            "check $whole/export --key $recipe": (1, 2),
            "doctor": (0, 1),
            "download $model": (0, 1),
            "prompt $whole x": (0, 1),
        }.items():
            yield Case(f"no {package}", command, f"{less} nf4 {command}", status)


def _python() -> Iterator[Case]:
    for option in (
        "-O",
        "-OO",
        "-W error",
        "-X dev",
        "-B",
        "-P",
        "-X utf8=0",
        "-bb",
        "-X tracemalloc",
    ):
        lines = (
            f"export python='{option}'; {DOWNLOAD} && nf4 quantize --build-dir build && "
            "nf4 serialize --build-dir build && nf4 status --build-dir build && nf4 build --help"
        )
        yield Case("python", option, lines)
    yield Case("python", "-OO, verify", f"export python=-OO; {VERIFY}", seconds=200)
    yield Case("python", "-W error, verify", f"export PYTHONWARNINGS=error; {VERIFY}", seconds=200)
    yield Case("python", "-bb, verify", f"export python=-bb; {VERIFY}", seconds=200)


def _inputs() -> Iterator[Case]:
    item = "prompts and texts"
    for name, content in {
        "UTF-16": "printf '\\xff\\xfeh\\0i\\0' > f",
        "a byte order mark": 'printf \'\\xef\\xbb\\xbf{"prompt": "hi"}\\n\' > f',
        "Latin-1": "printf 'caf\\xe9\\n' > f",
        "NUL": "head -c 5000 /dev/zero > f",
        "empty": "touch f",
        "blank lines": "printf '\\n\\n  \\n' > f",
        "a pipe": "mkfifo f",
        "a folder": "mkdir f",
        "sparse": "truncate -s 3G f",
        "one line of 8 MB": "head -c 8000000 /dev/zero | tr '\\0' x > f",
        "deep": "head -c 100000 /dev/zero | tr '\\0' '[' > f",
        "a number": "echo 1e999 > f",
        "no object": "echo '[]' > f",
        "wrong types": 'echo \'{"prompt": {"a": 1}, "text": [1], "expect": 3}\' > f',
        "controls": 'printf \'{"prompt": "a\\\\u001b[31m\\\\u0000"}\\n\' > f',
        "half letters": 'printf \'{"prompt": "\\\\ud800"}\\n\' > f',
        "missing": "true",
    }.items():
        for option in ("--prompts", "--eval-text"):
            lines = f"{content}; {VERIFY} {option} f"
            yield Case(item, f"{option} {name}", lines, (0, 1, 2), seconds=200)
        lines = f"{content}; copy downloaded; nf4 quantize --calibrate ./f --build-dir build"
        yield Case(item, f"--calibrate {name}", lines, (0, 1, 2), seconds=200)
    item = "models"
    make = "from tests.campaigns.odd_models import make; make"
    for name, said in {
        "no tensors": "",
        "zero-size tensors": "",
        "a vocabulary of 1": "",
        "one layer": "",
        "no layers": "",
        "sparse 3 GB tensor": "",
        "20,000 tiny tensors": "",
        "tar pickle": "",
        "legacy pickle": "",
    }.items():
        lines = f'{sys.executable} -c \'{make}("{name}", "m")\' && '
        lines += (
            "(ulimit -v 6000000; nf4 build m --allow-pickle --recipe $recipe --build-dir build)"
        )
        yield Case(item, name, lines, (0, 1), said, seconds=300)


def _signals() -> Iterator[Case]:
    begin = {
        "download": ("model", "download $model"),
        "quantize": ("downloaded", "quantize"),
        "serialize": ("quantized", "serialize"),
        "verify": ("exported", "verify --recipe $recipe"),
        "attest": ("verified", "attest"),
        "build": ("model", "build $model --recipe $recipe"),
    }
    for name, (place, stage) in begin.items():
        before = "" if place == "model" else f"copy {place}; "
        command = f"{sys.executable} -m nf4_pipeline {stage} --build-dir build"
        for delay in (0.3, 1.0, 4.0):
            if delay > 1 and name not in ("verify", "build", "download"):
                continue
            lines = (
                f"{before} {command} & p=$!; sleep {delay}; kill -HUP $p; wait $p; s=$?; "
                "sleep 0.5; "
                "! pgrep -P $p && ! find . -name '.*.partial' | grep . && "
                f"{command} && nf4 status --build-dir build >/dev/null && (exit $s)"
            )
            yield Case("SIGHUP", f"{name} after {delay} s", lines, (129, 0), seconds=300)
        lines = (
            f"{before} {command} & p=$!; for i in 1 2 3 4 5; do sleep 0.4; kill -STOP $p; "
            "sleep 0.5; kill -CONT $p; done 2>/dev/null; wait $p"
        )
        yield Case("SIGSTOP", name, lines, seconds=300)
    for worker in ("source_worker", "artifact_worker", "stock_reader", "probe_worker"):
        lines = (
            f"copy exported; {sys.executable} -m nf4_pipeline build $model --recipe $recipe "
            "--build-dir build & p=$!; "
            f"k() {{ pgrep -P $p -f {worker}; }}; for i in $(seq 600); do k && break; "
            "kill -0 $p 2>/dev/null || break; sleep 0.1; done > k; "
            "for i in 1 2 3; do sleep 1; k | xargs -r kill -9; done; wait $p"
        )
        if worker == "probe_worker":
            lines = lines.replace("copy exported; ", "")
        yield Case("a worker killed", worker, lines, (0, 1), seconds=300)


def _together() -> Iterator[Case]:
    item = "two at once"
    build = f"{sys.executable} -m nf4_pipeline build $model --recipe $recipe"
    lines = f"{build} --build-dir a & p=$!; {build} --build-dir a; s=$?; wait $p; echo $s $?"
    yield Case(item, "one build folder", lines, (0,), "(0 1|1 0|0 0)", seconds=300)
    lines = f"{build} --build-dir a & p=$!; {build} --build-dir b; s=$?; wait $p && (exit $s)"
    yield Case(item, "two build folders", lines, seconds=300)
    lines = f"{build} & p=$!; {build}; s=$?; wait $p; echo $s $?"
    yield Case(item, "the same default folder", lines, (0,), "(0 1|1 0|0 0)", seconds=300)
    held = "copy whole; (flock 9; {0}) 9<> build/.lock"
    for command in ("push --repo-id a/b", "quantize", "serialize", "verify", "attest"):
        lines = held.format(f"nf4 {command} --build-dir build")
        yield Case(item, command, lines, (1,), "in use by another nf4 process")


def _clocks() -> Iterator[Case]:
    clock = (
        "printf '#define _GNU_SOURCE\n#include <time.h>\n#include <sys/syscall.h>\n"
        "#include <unistd.h>\nstatic long n; int clock_gettime(clockid_t c, struct timespec *t) {{ "
        "int r = syscall(SYS_clock_gettime, c, t); if (c == CLOCK_REALTIME) t->tv_sec {0}; "
        "return r; }}\n' | gcc -w -shared -fPIC -x c - -o c.so; export LD_PRELOAD=$PWD/c.so; "
    )
    for name, change in {
        "goes backwards": "-= 100 * n++",
        "of 1970": "= 5",
        "of 2200": "+= 5500000000",
        "before 1970": "= -5000",
    }.items():
        lines = clock.format(change) + f"{DOWNLOAD} && nf4 quantize --build-dir build && "
        lines += "nf4 serialize --build-dir build && nf4 status --build-dir build"
        yield Case("clock", name, lines)
        lines = clock.format(change).replace("; export", "; copy exported; export")
        lines += "nf4 verify --recipe $recipe --build-dir build && nf4 attest --build-dir build"
        yield Case("clock", f"{name}, verify", lines, seconds=200)
    lines = "cp -r $model m; touch -d 1901-01-01 m/*; nf4 download m --build-dir build"
    yield Case("clock", "files of 1901", lines)
    lines = "cp -r $model m; touch -d 2400-01-01 m/*; nf4 download m --build-dir build"
    yield Case("clock", "files of 2400", lines)


_QUICK: Final = {
    "ulimit -n: 8, quantize",
    "ulimit -u: 3, quantize",
    "calls that a file system lacks: hints",
}
CASES: Final = tuple(
    replace(case, quick=f"{case.item}: {case.name}" in _QUICK) for case in _cases()
)
