# Sourced by the other scripts: make .venv if needed and leave its interpreter in $PY.
#   . scripts/setup.sh                                installs what the program needs
#   EXTRA=requirements-dev.txt; . scripts/setup.sh    and that list too
# Installs the CUDA build of JAX only where an NVIDIA driver answers. A second call installs nothing.
# Also asks glibc for memory in huge pages, which on CPU trains faster: docs/speed.md.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
       "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: no Python >= 3.11 found; install one or name it with PYTHON=/path/to/python." >&2
  return 1
}

export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"

exec 9<requirements.txt  # one at a time, where several start at once
! command -v flock >/dev/null || flock 9 || true
PY="$PWD/.venv/bin/python"
lists=(requirements-cpu.txt)
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  lists=(requirements.txt)
fi
[ -z "${EXTRA:-}" ] || lists+=("$EXTRA")

if ! "$PY" -c '' 2>/dev/null; then
  python=$(find_python) || exit 1
  "$python" -m venv --clear .venv || { echo "setup: '$python -m venv' failed." >&2; exit 1; }
fi
for list in "${lists[@]}"; do
  stamp=".venv/.installed-$list"
  wanted=$(cat requirements*.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing $list into .venv (once)" >&2
    "$PY" -m pip install --quiet --disable-pip-version-check --requirement "$list" ||
      { echo "setup: pip could not install $list; is there a network?" >&2; exit 1; }
    echo "$wanted" > "$stamp"
  fi
done
exec 9<&-
