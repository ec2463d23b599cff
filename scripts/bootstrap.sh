#!/bin/sh
# Make .venv with this project and its development tools in it, or bring it up to date. Quick when nothing changed.
# Needs a Python >= 3.12 (looked for on PATH, among pyenv's versions and uv's) and the package index pip is set up for.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.installed-from
# The folder is part of it: an environment does not survive being moved.
wanted=$({ pwd; cat pyproject.toml constraints.txt; } | cksum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

usable() { # a pyenv shim exists for every version but runs only the selected one, so each candidate has to run
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name" || true
    done
    if command -v pyenv >/dev/null 2>&1; then
        for interpreter in "$(pyenv root)"/versions/*/bin/python; do
            echo "$interpreter"
        done
    fi
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-project '>=3.12' 2>/dev/null || true
    fi
}

if ! usable .venv/bin/python; then
    found=
    # One path a line, so that a path may hold spaces.
    while IFS= read -r candidate; do
        if usable "$candidate"; then
            found=$candidate
            break
        fi
    done <<EOF
$(candidates)
EOF
    if [ -z "$found" ]; then
        echo "No Python >= 3.12 with the venv module was found (on PATH, in pyenv, in uv); install one, for example" \
            "'apt install python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12', and run make again." >&2
        exit 1
    fi
    "$found" -m venv --clear .venv
fi

echo "Installing into .venv with $(.venv/bin/python --version); the first time this fetches about 3 GB" \
    "(PyTorch for Linux comes with CUDA)."
quiet=--quiet
if [ -t 1 ]; then quiet=; fi # a terminal gets pip's progress bars, a log does not
if ! .venv/bin/python -m pip install $quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; then
    echo "pip could not install the project (its message is above); once that is mended, the same command goes on." >&2
    exit 1
fi
echo "$wanted" >"$stamp"
