#!/bin/sh
# Create or update .venv with this project and its development tools. Does nothing if nothing has changed.
# Needs Python >= 3.12 (on PATH, in pyenv or in uv) and a pip that can reach its package index.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.installed-from
# Includes the folder: a virtual environment does not work after it is moved.
wanted=$({ pwd; cat pyproject.toml constraints.txt; } | cksum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

usable() { # runs the candidate: pyenv has a shim for every version, but only the selected one works
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
    # One path per line: paths may contain spaces.
    while IFS= read -r candidate; do
        if usable "$candidate"; then
            found=$candidate
            break
        fi
    done <<EOF
$(candidates)
EOF
    if [ -z "$found" ]; then
        echo "No Python >= 3.12 with the venv module was found on PATH, in pyenv or in uv; install one, for example" \
            "with 'apt install python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12', and run make again." >&2
        exit 1
    fi
    "$found" -m venv --clear .venv
fi

echo "Installing into .venv with $(.venv/bin/python --version). The first time, this downloads about 3 GB" \
    "(PyTorch for Linux includes CUDA)."
quiet=--quiet
if [ -t 1 ]; then quiet=; fi # show pip's progress on a terminal, but not in a log
if ! .venv/bin/python -m pip install $quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; then
    echo "pip could not install the project: see its message above. After fixing the cause, run the same command again." >&2
    exit 1
fi
echo "$wanted" >"$stamp"
